"""Train clients in this process, one at a time or in blocks, or in the processes of a pool.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import (
    Array,
    ClientId,
    Examples,
    Failure,
    FailureStage,
    InFlight,
    Predictions,
    Request,
    Updates,
)
from fedlearn.core.threads import available_cores
from fedlearn.engines.block_training import Block, BlockTrainer, block_slices
from fedlearn.engines.process_pool import MAX_BLOCKS_PER_PROCESS, ProcessPool
from fedlearn.errors import is_count, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.local_training import personal_model
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.contract import check_data, warn_about


class InProcessEngine(BaseEngine):
    """Run clients in this process, ``block_size`` at a time, or in the processes of a pool.

    Args:
        data: examples of each client.
        trainer: trainer of the model.
        block_size: clients per block in this process, >= 1.
        mixed_block_size: clients per block of requests from different rounds (asynchronous strategies); None:
            ``block_size``. After a stop these blocks have other clients, so results must not depend on the block.
        raise_failures: True raises the exception of the first client that fails, for a debugger. False records a
            `Failure`, and the round continues. The command ``q`` of a debugger always ends the run.
        pool: processes that train the blocks with much work; None trains all blocks in this process.
    """

    in_process = True

    def __init__(
        self,
        data: FederatedData,
        trainer: Trainer,
        *,
        block_size: int,
        mixed_block_size: int | None = None,
        raise_failures: bool = False,
        pool: ProcessPool | None = None,
    ) -> None:
        super().__init__(data.clients, trainer.layout)
        self.data, self.pool, self.block_size = data, pool, block_size
        self.trainer: Trainer = pool or trainer
        self.mixed_block_size = min(block_size, mixed_block_size or block_size)
        self._blocks = BlockTrainer(data, trainer, raise_failures=raise_failures)

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort, one block after another."""
        if request.client_models:
            for block in split_into_blocks(cohort, self.block_size):
                yield from self._fit_client_models(request, strategy, block)
            return
        yield from self._train(strategy, sorted(cohort), [request])

    def _fit_client_models(
        self, request: Request, strategy: Strategy, block: Sequence[ClientId]
    ) -> Iterator[Updates | Failure]:
        """Train a block of clients that receive different models, together if the rule supports it."""
        requests = [InFlight(client=client, request=request.for_client(client)) for client in block]
        if strategy.local.supports_mixed_rounds and len(block) > 1:
            yield from self.fit_mixed_rounds(strategy, requests)
            return
        for item in requests:
            yield from self.fit(item.request, strategy, [item.client])

    def fit_mixed_rounds(self, strategy: Strategy, block: Sequence[InFlight]) -> Iterator[Updates | Failure]:
        """Train a block of clients whose requests are from different rounds."""
        clients, requests = [item.client for item in block], [item.request for item in block]
        yield from self._train(strategy, clients, requests, is_mixed=True)

    def _train(
        self, strategy: Strategy, clients: Sequence[ClientId], requests: Sequence[Request], *, is_mixed: bool = False
    ) -> Iterator[Updates | Failure]:
        """Train clients with one request, or with one request each. Store their new states."""
        num_examples = round(len(clients) * self._mean_size) if self.pool else 0
        pool = self.pool if len(clients) > 1 and self.pool and self.pool.supports(requests[0], num_examples) else None
        parts = pool.parts(len(clients)) if pool else block_slices(len(clients), -(-len(clients) // self.block_size))
        blocks = [self._block(clients[part], requests[part] if is_mixed else requests, is_mixed) for part in parts]
        in_turn = (self._blocks.train(strategy, block) for block in blocks)
        for result in pool.train(strategy, blocks) if pool else chain.from_iterable(in_turn):
            if isinstance(result, Updates):
                self._store_client_states(result)
            yield result
            del result  # its memory serves the next block

    def _block(self, clients: Sequence[ClientId], requests: Sequence[Request], is_mixed: bool) -> Block:
        states = {client: self.client_states[client] for client in clients if client in self.client_states}
        return Block(clients=clients, requests=requests, client_states=states, is_mixed=is_mixed)

    @cached_property
    def _mean_size(self) -> float:
        """The mean number of training examples of a few clients."""
        sizes = []
        for i in range(min(10, len(self.clients))):
            try:
                sizes.append(len(self.data.train(self.clients[i])))
            except Exception:  # a failure of this client, in its round
                sizes.append(0)
        return float(np.mean(sizes or [0]))

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """Yield the outputs of the model, or of the personal model, on the held-out part of each client.

        Clients with the same model share one pass over their concatenated examples.
        """
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
        self, params_D: Array, tests: Mapping[ClientId, Examples], personal_strategy: Strategy | None
    ) -> Iterable[np.ndarray]:
        if personal_strategy is None:
            outputs = self.trainer.predict(params_D, np.concatenate([test.x for test in tests.values()]))
            return np.split(outputs, np.cumsum([len(test) for test in tests.values()])[:-1])
        initial, rule = initial_client_state(personal_strategy, self.layout, params_D), personal_strategy.local
        states = {client: self.client_states.get(client, initial) for client in tests}
        models = {client: personal_model(rule, self.layout, params_D, states[client]) for client in tests}
        return (self.trainer.predict(models[client], test.x) for client, test in tests.items())

    def describe(self, cohort_size: int) -> str:
        """Return how a cohort is trained, and the memory of the updates of one block, for the header."""
        num_examples, block = round(cohort_size * self._mean_size), min(self.block_size, cohort_size)
        pool = self.pool if cohort_size > 1 and self.pool and self.pool.is_worthwhile(num_examples) else None
        if pool:
            block = max(part.stop - part.start for part in pool.parts(cohort_size))
        batching = (pool or self._blocks.trainer).describe_batching(block, round(block * self._mean_size))
        kib = block * 4 * self.layout.num_parameters / 1024
        return f"{batching}, {block} at a time in {f'{kib / 1024:.0f} MiB' if kib > 1024 else f'{kib:.1f} KiB'}"

    def close(self) -> None:
        """Close the trainer, which may have child processes."""
        self.trainer.close()

    def _store_client_states(self, updates: Updates) -> None:
        states: Mapping[str, Array] = {name: as_numpy(v) for name, v in updates.client_state.items()}
        if states:
            for k, client in enumerate(updates.clients_K.tolist()):
                self.client_states[client] = {name: rows_KD[k].copy() for name, rows_KD in states.items()}


def split_into_blocks(cohort: Sequence[ClientId], size: int) -> Iterator[Sequence[ClientId]]:
    """Yield the cohort in ascending order, in blocks of at most ``size`` clients."""
    ascending = sorted(cohort)
    for start in range(0, len(ascending), size):
        yield ascending[start : start + size]


BATCHINGS = ("auto", "map", "vmap", "joint", "process_pool")
MAX_MIXED_BLOCK_SIZE = 31  # clients per block of requests from different rounds; below 32, ``auto`` trains bit-exactly
MAX_BLOCK_BYTES = 2**29  # bytes of the updates of a block on a device with memory of its own
MAX_BLOCK_SHARE = 16  # the updates of a block take at most this part of the memory of the device
MAX_CACHED_BYTES = 2**25  # bytes of the updates of a block on a CPU; larger blocks leave its cache


@engine_builder(in_process=True)
def vector(
    data: FederatedData, trainer: Trainer, *, block_size: int | None = None, batching: str = "auto"
) -> InProcessEngine:
    """Return an engine that runs blocks of clients.

    Args:
        data: examples of each client.
        trainer: trainer of the model.
        block_size: maximum number of clients per block, >= 1. None: on a CPU, as many as fit its cache, at least one
            per core. On other devices, as many as fit 512 MiB of updates and a sixteenth of the memory. At most 1024.
        batching: method to train a block, default ``auto``. ``map``: one client after another (JAX: in one program per
            core). ``vmap``: all clients step together, as one batch of models. ``joint``: one forward pass has rows of
            several clients, for adapters over a frozen base in torch, in a process per core. ``process_pool``: one
            process per core, for torch on the CPU of a Linux machine. ``auto``: a method for the device, the model and
            the block; the header shows it.

    Guarantees:
        Results do not depend on ``block_size``. They depend on ``batching`` by at most 1e-5 after 20 rounds. In torch,
        ``map`` and ``process_pool`` are bit-identical to the serial engine. ``auto`` is bit-identical too, for blocks
        of less than 32 clients or models of more than 20,000 parameters. The size does not matter for a
        ``torch.nn.Sequential`` of linear layers and activations, without DP-SGD and changes of the loss. With an
        asynchronous strategy, a resumed run has other blocks than an uninterrupted run. Therefore ``auto`` on a CPU
        uses blocks of less than 32 clients there. With ``vmap`` a resumed run is equal up to rounding only.

    Raises:
        SettingError: A setting is out of range, or the trainer does not support this batching.
    """
    is_valid = block_size is None or is_count(block_size)
    require(is_valid, "block_size", block_size, "null (automatic), or a whole number >= 1", "block_size=null")
    require(batching in BATCHINGS, "batching", batching, f"one of {', '.join(BATCHINGS)}", "batching=auto")
    warn_about(check_data(trainer, data))
    can_fork = trainer.supports_process_pool and sys.platform == "linux"
    expected = "another method: a process pool needs Linux and a trainer that supports it (torch on a CPU)"
    require(can_fork or batching != "process_pool", "batching", batching, expected, "batching=auto")
    batched = trainer.with_batching("map" if batching == "process_pool" else batching)
    is_fork_safe = (
        can_fork and available_cores() > 1 and "jax" not in sys.modules
    )  # threads of jax do not survive a fork
    pool = None
    if batching == "process_pool" or (batching in ("auto", "joint") and is_fork_safe):
        cores, is_auto = max(2, available_cores()), batching == "auto"
        per_process = 1 if batching == "joint" else MAX_BLOCKS_PER_PROCESS
        pool = ProcessPool(
            batched, data, num_processes=cores, auto=is_auto, block_size=block_size, blocks_per_process=per_process
        )
    return InProcessEngine(
        data,
        batched,
        block_size=block_size or automatic_block_size(trainer),
        mixed_block_size=MAX_MIXED_BLOCK_SIZE if batching == "auto" and trainer.device == "cpu" else None,
        pool=pool,
    )


def automatic_block_size(trainer: Trainer) -> int:
    """Return the number of clients of a block whose updates fit the cache of a CPU or the memory of a device."""
    bytes_per_client = 4 * max(1, trainer.layout.num_parameters)
    if trainer.device == "cpu":
        return min(1024, max(available_cores(), MAX_CACHED_BYTES // bytes_per_client))
    memory = getattr(trainer, "device_memory", None) or MAX_BLOCK_SHARE * MAX_BLOCK_BYTES
    return min(1024, max(1, min(MAX_BLOCK_BYTES, memory // MAX_BLOCK_SHARE) // bytes_per_client))


@engine_builder(in_process=True)
def serial(data: FederatedData, trainer: Trainer, *, raise_failures: bool = False) -> InProcessEngine:
    """Return an engine that runs one client at a time.

    Args:
        data: examples of each client.
        trainer: trainer of the model.
        raise_failures: True raises the exception of the first client that fails, for a debugger.

    Raises:
        SettingError: ``raise_failures`` is not True or False.
    """
    require(isinstance(raise_failures, bool), "raise_failures", raise_failures, "true or false", "raise_failures=true")
    warn_about(check_data(trainer, data))
    return InProcessEngine(data, trainer, block_size=1, raise_failures=raise_failures)
