"""What the loop asks of an engine, and what engines in this process share.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from fedlearn.aggregate import Gathered
from fedlearn.arrays import as_numpy
from fedlearn.client import client_step, client_steps, initial_memory
from fedlearn.data.federated import FederatedData
from fedlearn.errors import require
from fedlearn.layout import Layout
from fedlearn.records import (
    Array,
    ClientId,
    Examples,
    Failure,
    Flying,
    Memory,
    Order,
    Predictions,
    Tally,
    Updates,
    Work,
)  # fmt: skip
from fedlearn.strategy import Strategy
from fedlearn.trainers.base import Trainer
from fedlearn.training import own_model


class Engine(Protocol):
    """Takes an order to a cohort and brings back updates, in ascending order of client ids.

    Attributes:
        clients: all clients, sized and indexable.
        layout: of the model that it trains.
        memories: what each client keeps for itself, by client; a checkpoint saves and restores it.
        deployed: whether its clients are real ones: their noise must then not follow from the run's seed.
    """

    clients: Sequence[ClientId]
    layout: Layout
    memories: dict[ClientId, Memory]
    deployed: bool

    def fit(
        self, order: Order, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | Gathered | Failure]:
        """Train the cohort; an engine may fold what its aggregator can merge (see `fedlearn.aggregate.gather`)."""
        ...

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], own: Strategy | None = None
    ) -> Iterator[Predictions | Tally | Failure]:
        """The model's outputs on the held-out part of each client, or what a client tells of them.

        With ``own``, a strategy, each client uses its own model: what it keeps under it, completed by ``params_D``.
        """
        ...

    def describe(self, cohort_size: int) -> str:
        """How a cohort of so many clients is trained, for the header."""
        ...

    def close(self) -> None:
        """Let go of workers and connections."""
        ...


class Landing(NamedTuple):
    """The end of an order that was under way.

    Attributes:
        place: which of those that were handed over.
        result: what the client brought, or why it brought nothing.
        clock: when, in seconds since the run began.
    """

    place: int
    result: Updates | Failure
    clock: float


@runtime_checkable
class Lander(Protocol):
    """What an asynchronous strategy asks of an engine besides."""

    def land(self, strategy: Strategy, flying: Sequence[Flying], clock: float) -> Landing:
        """Wait for the next of these orders, of one client each, to end.

        Those that were not handed over before are sent out; what was, and is no longer among them, is given up. All
        that matters is in the arguments, so that a run which goes on from a checkpoint finds the same orders under way.
        """
        ...


@runtime_checkable
class Mixer(Protocol):
    """An engine that trains clients as one block though their orders differ in age.

    Attributes:
        mixed_size: clients in such a block at most.
    """

    mixed_size: int

    def fit_mixed(self, strategy: Strategy, block: Sequence[Flying]) -> Iterator[Updates | Failure]:
        """Train a block under a rule that `fedlearn.training.mixes`; no client is there twice."""
        ...


class LocalEngine:
    """Runs clients in this process, ``block_size`` at a time.

    Args:
        data: examples by client.
        trainer: of the model.
        block_size: clients in a block.
        mixed_size: in a block of orders of different ages, whose clients are others after a stop; None: as many.
    """

    deployed = False

    def __init__(
        self, data: FederatedData, trainer: Trainer, *, block_size: int, mixed_size: int | None = None
    ) -> None:
        self.data, self.trainer, self.block_size = data, trainer, block_size
        self.mixed_size = min(block_size, mixed_size or block_size)
        self.clients, self.layout = data.clients, trainer.layout
        self.memories: dict[ClientId, Memory] = {}

    def fit(self, order: Order, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort, block after block."""
        fresh = initial_memory(strategy, self.layout, order.params_D)
        for block in blocks(cohort, self.block_size):
            work = []
            for client in block:
                try:
                    work.append(self._work(client, fresh))
                except Exception as error:
                    yield failure(client, "data", error)
            if work:
                yield from self._fit_block(order, strategy, work)

    def fit_mixed(self, strategy: Strategy, block: Sequence[Flying]) -> Iterator[Updates | Failure]:
        """Train a block of clients whose orders differ in age."""
        orders, work = [], []
        for one in block:
            try:
                work.append(self._work(one.client, initial_memory(strategy, self.layout, one.order.params_D)))
                orders.append(one.order)
            except Exception as error:
                yield failure(one.client, "data", error)
        if work:
            yield from self._fit_mixed(strategy, orders, work)

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], own: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """Predict, for many clients in one pass over their examples laid end to end where they share a model."""
        for block in blocks(cohort, 256):
            tests = {client: self.data.test(client) for client in block}
            tests = {client: test for client, test in tests.items() if len(test)}
            if not tests:
                continue
            for (client, test), outputs in zip(tests.items(), self._predict(params_D, tests, own), strict=True):
                if np.isfinite(outputs).all():
                    yield Predictions(client=client, outputs=outputs, targets=test.y)
                else:
                    yield Failure(client=client, stage="evaluate", reason="predictions are not finite")

    def _predict(
        self, params_D: Array, tests: Mapping[ClientId, Examples], own: Strategy | None
    ) -> Iterable[np.ndarray]:
        if own is None:
            outputs = self.trainer.predict(params_D, np.concatenate([test.x for test in tests.values()]))
            return np.split(outputs, np.cumsum([len(test) for test in tests.values()])[:-1])
        fresh = initial_memory(own, self.layout, params_D)
        memories = {client: self.memories.get(client, fresh) for client in tests}
        models = {client: own_model(own.local, self.layout, params_D, memories[client]) for client in tests}
        return (self.trainer.predict(models[client], test.x) for client, test in tests.items())

    def describe(self, cohort_size: int) -> str:
        """How a cohort of so many clients is trained, and the memory that its updates take at once."""
        block = min(self.block_size, cohort_size)
        some = [len(self.data.train(self.clients[i])) for i in range(min(10, len(self.clients)))]
        how = self.trainer.batching_of(block, round(block * float(np.mean(some or [0]))))
        kib = block * 4 * self.layout.num_parameters / 1024
        return f"{how}, {block} at a time in {f'{kib / 1024:.0f} MiB' if kib > 1024 else f'{kib:.1f} KiB'}"

    def close(self) -> None:
        """Let go of worker processes, if the trainer has any."""
        close = getattr(self.trainer, "close", None)
        if close:
            close()

    def _work(self, client: ClientId, fresh: Memory) -> Work:
        examples = self.data.train(client)
        if not len(examples):
            raise ValueError(f"client {self.data.name(client)} has no training examples")
        return Work(client=client, examples=examples, memory=self.memories.get(client, fresh))

    def _fit_block(self, order: Order, strategy: Strategy, work: Sequence[Work]) -> Iterator[Updates | Failure]:
        try:
            updates, failures = client_step(self.trainer, strategy, order, work)
        except Exception as error:
            if len(work) == 1:
                yield failure(work[0].client, "fit", error)
            else:  # one client spoilt the block: find it, and keep what the others did
                for one in work:
                    yield from self._fit_block(order, strategy, [one])
            return
        yield from failures
        if len(updates):
            self._remember(updates)
            yield updates

    def _fit_mixed(
        self, strategy: Strategy, orders: Sequence[Order], work: Sequence[Work]
    ) -> Iterator[Updates | Failure]:
        try:
            results = client_steps(self.trainer, strategy, orders, work)
        except Exception:  # one client spoilt the block, or is the block
            for order, one in zip(orders, work, strict=True):
                yield from self._fit_block(order, strategy, [one])
            return
        for result in results:
            if isinstance(result, Updates):
                self._remember(result)
            yield result

    def _remember(self, updates: Updates) -> None:
        kept: Mapping[str, Array] = {name: as_numpy(v) for name, v in updates.memory.items()}
        if kept:
            for k, client in enumerate(updates.clients_K.tolist()):
                self.memories[client] = {name: rows_KD[k].copy() for name, rows_KD in kept.items()}


def refuse_early_end(strategy: Strategy, enough: int | None, setting: str) -> None:
    """Refuse to close rounds before all have answered where a privacy claim rests on the draw.

    Raises:
        SettingError: names the setting by which they would close.
    """
    expected = "null: a privacy claim rests on who was drawn, not on who was first"
    require(enough is None or strategy.protection is None, setting, enough, expected, f"{setting}=null")


def blocks(cohort: Sequence[ClientId], size: int) -> Iterator[Sequence[ClientId]]:
    """The cohort in ascending order, cut into blocks."""
    ascending = sorted(cohort)
    for start in range(0, len(ascending), size):
        yield ascending[start : start + size]


def failure(client: ClientId, stage: str, error: Exception) -> Failure:
    """A client's exception as a record."""
    reason = f"{type(error).__name__}: {error}"
    return Failure(client=client, stage=stage, reason=reason, traceback=traceback.format_exc())
