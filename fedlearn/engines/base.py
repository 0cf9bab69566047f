"""What the loop asks of an engine, and what engines in this process share.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import (
    Array,
    ClientId,
    ClientWork,
    Examples,
    Failure,
    FailureStage,
    InFlight,
    Predictions,
    Request,
    State,
    Updates,
)
from fedlearn.errors import is_count, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.client_update import client_step, client_step_mixed_rounds, initial_client_state
from fedlearn.loop.local_training import personal_model
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.base import available_cores
from fedlearn.trainers.process_pool import ProcessPoolTrainer


class InProcessEngine(BaseEngine):
    """Run clients in this process, ``block_size`` at a time.

    Args:
        data: examples by client.
        trainer: of the model.
        block_size: clients in a block.
        mixed_block_size: in a block of orders of different ages, whose clients are others after a stop; None: as many.
    """

    in_process = True

    def __init__(
        self, data: FederatedData, trainer: Trainer, *, block_size: int, mixed_block_size: int | None = None
    ) -> None:
        super().__init__(data.clients, trainer.layout)
        self.data, self.trainer, self.block_size = data, trainer, block_size
        self.mixed_block_size = min(block_size, mixed_block_size or block_size)

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort, block after block."""
        fresh = initial_client_state(strategy, self.layout, request.params_D)
        for block in split_into_blocks(cohort, self.block_size):
            work = []
            for client in block:
                try:
                    work.append(self._work(client, fresh))
                except Exception as error:
                    yield failure(client, FailureStage.DATA, error)
            if work:
                yield from self._fit_block(request, strategy, work)

    def fit_mixed_rounds(self, strategy: Strategy, block: Sequence[InFlight]) -> Iterator[Updates | Failure]:
        """Train a block of clients whose orders differ in age."""
        orders, work = [], []
        for one in block:
            try:
                work.append(self._work(one.client, initial_client_state(strategy, self.layout, one.request.params_D)))
                orders.append(one.request)
            except Exception as error:
                yield failure(one.client, FailureStage.DATA, error)
        if work:
            yield from self._fit_mixed(strategy, orders, work)

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """Predict, for many clients in one pass over their examples laid end to end where they share a model."""
        for block in split_into_blocks(cohort, 256):
            tests = {client: self.data.test(client) for client in block}
            tests = {client: test for client, test in tests.items() if len(test)}
            if not tests:
                continue
            for (client, test), outputs in zip(
                tests.items(), self._predict(params_D, tests, personal_strategy), strict=True
            ):
                if np.isfinite(outputs).all():
                    yield Predictions(client=client, outputs=outputs, targets=test.y)
                else:
                    yield Failure(client=client, stage=FailureStage.EVALUATE, reason="predictions are not finite")

    def _predict(
        self, params_D: Array, tests: Mapping[ClientId, Examples], own: Strategy | None
    ) -> Iterable[np.ndarray]:
        if own is None:
            outputs = self.trainer.predict(params_D, np.concatenate([test.x for test in tests.values()]))
            return np.split(outputs, np.cumsum([len(test) for test in tests.values()])[:-1])
        fresh = initial_client_state(own, self.layout, params_D)
        memories = {client: self.client_states.get(client, fresh) for client in tests}
        models = {client: personal_model(own.local, self.layout, params_D, memories[client]) for client in tests}
        return (self.trainer.predict(models[client], test.x) for client, test in tests.items())

    def describe(self, cohort_size: int) -> str:
        """How a cohort of so many clients is trained, and the memory that its updates take at once."""
        block = min(self.block_size, cohort_size)
        some = [len(self.data.train(self.clients[i])) for i in range(min(10, len(self.clients)))]
        how = self.trainer.describe_batching(block, round(block * float(np.mean(some or [0]))))
        kib = block * 4 * self.layout.num_parameters / 1024
        return f"{how}, {block} at a time in {f'{kib / 1024:.0f} MiB' if kib > 1024 else f'{kib:.1f} KiB'}"

    def close(self) -> None:
        """Close the trainer, which may have started processes."""
        self.trainer.close()

    def _work(self, client: ClientId, fresh: State) -> ClientWork:
        examples = self.data.train(client)
        if not len(examples):
            raise ValueError(f"client {self.data.name(client)} has no training examples")
        return ClientWork(client=client, examples=examples, client_state=self.client_states.get(client, fresh))

    def _fit_block(self, order: Request, strategy: Strategy, work: Sequence[ClientWork]) -> Iterator[Updates | Failure]:
        try:
            updates, failures = client_step(self.trainer, strategy, order, work)
        except Exception as error:
            if len(work) == 1:
                yield failure(work[0].client, FailureStage.FIT, error)
            else:  # one client spoilt the block: find it, and keep what the others did
                for one in work:
                    yield from self._fit_block(order, strategy, [one])
            return
        yield from failures
        if len(updates):
            self._remember(updates)
            yield updates

    def _fit_mixed(
        self, strategy: Strategy, orders: Sequence[Request], work: Sequence[ClientWork]
    ) -> Iterator[Updates | Failure]:
        try:
            results = client_step_mixed_rounds(self.trainer, strategy, orders, work)
        except Exception:  # one client spoilt the block, or is the block
            for order, one in zip(orders, work, strict=True):
                yield from self._fit_block(order, strategy, [one])
            return
        for result in results:
            if isinstance(result, Updates):
                self._remember(result)
            yield result

    def _remember(self, updates: Updates) -> None:
        kept: Mapping[str, Array] = {name: as_numpy(v) for name, v in updates.client_state.items()}
        if kept:
            for k, client in enumerate(updates.clients_K.tolist()):
                self.client_states[client] = {name: rows_KD[k].copy() for name, rows_KD in kept.items()}


def split_into_blocks(cohort: Sequence[ClientId], size: int) -> Iterator[Sequence[ClientId]]:
    """The cohort in ascending order, cut into blocks."""
    ascending = sorted(cohort)
    for start in range(0, len(ascending), size):
        yield ascending[start : start + size]


def failure(client: ClientId, stage: FailureStage, error: Exception) -> Failure:
    """Return the record of an exception of one client."""
    reason = f"{type(error).__name__}: {error}"
    return Failure(client=client, stage=stage, reason=reason, traceback=traceback.format_exc())


BATCHINGS = ("auto", "map", "vmap", "process_pool")
MAX_MIXED_BLOCK_SIZE = (
    31  # clients in a block of orders of different ages: few enough for ``auto`` to train them exactly as alone
)
MAX_BLOCK_BYTES = 512 * 2**20  # of updates held at once when the size is chosen automatically


@engine_builder(in_process=True)
def vector(
    data: FederatedData, trainer: Trainer, *, block_size: int | None = None, batching: str = "auto"
) -> InProcessEngine:
    """Return an engine that runs blocks of clients.

    Args:
        data: examples by client.
        trainer: of the model.
        block_size: clients in a block, >= 1; None takes as many as keep their updates within 512 MiB, at most 1024.
        batching: how a block is trained. ``map``: one client after another (JAX: inside one program for each core).
            ``vmap``: all clients step together, as one batch of models. ``process_pool``: processes, one a core, for
            torch on the CPU of a Linux machine. ``auto``: what suits device, model and block; the header says what.

    *Guarantees*: results do not depend on ``block_size``, nor on ``batching`` by more than 1e-5 after 20 rounds. In
    torch ``map`` and ``process_pool`` are bit-identical to the serial engine, and so is ``auto`` for blocks of less
    than 32 clients or models of more than 20,000 parameters. Under an asynchronous strategy ``auto`` on a CPU keeps
    blocks below that, as what is under way together is not the same after a stop; ``vmap`` there repeats to rounding.

    Raises:
        SettingError: a setting is out of range, or the trainer cannot be batched so.
    """
    ok = block_size is None or is_count(block_size)
    require(ok, "block_size", block_size, "null (automatic), or a whole number >= 1", "block_size=null")
    require(batching in BATCHINGS, "batching", batching, f"one of {', '.join(BATCHINGS)}", "batching=auto")
    can_fork = trainer.supports_process_pool and sys.platform == "linux"
    expected = "another, because processes need Linux and a trainer that supports_process_pool (torch on a CPU)"
    require(can_fork or batching != "process_pool", "batching", batching, expected, "batching=auto")
    made = trainer.with_batching("map" if batching == "process_pool" else batching)
    safe = can_fork and available_cores() > 1 and "jax" not in sys.modules  # whose threads do not survive a fork
    if batching == "process_pool" or (batching == "auto" and safe):
        made = ProcessPoolTrainer(made, data, num_processes=max(2, available_cores()), auto=batching == "auto")
    automatic = min(1024, max(1, MAX_BLOCK_BYTES // (4 * max(1, trainer.layout.num_parameters))))
    exactly = batching == "auto" and trainer.device == "cpu"
    return InProcessEngine(
        data, made, block_size=block_size or automatic, mixed_block_size=MAX_MIXED_BLOCK_SIZE if exactly else None
    )


@engine_builder(in_process=True)
def serial(data: FederatedData, trainer: Trainer) -> InProcessEngine:
    """Return an engine that runs one client at a time."""
    return InProcessEngine(data, trainer, block_size=1)
