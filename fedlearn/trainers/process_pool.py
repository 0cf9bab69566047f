"""Run a trainer in several processes: each core trains its share of a block, in one thread.

The pool forks its processes and shares memory with them. A pool of loky (joblib 1.6.0) pickles the updates instead.
A block of 16 clients with a million parameters then takes 198 ms without any training. This pool takes 22 ms (two
processes).

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

import mmap
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Array, ClientWork, Examples, MetricSum, Request, Updates
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.wrappers import TrainerWrapper
from fedlearn.trainers.batching import balance_shares, prediction_parts

MIN_PARALLEL_WORK = 10_000_000  # examples times parameters; this takes a few milliseconds of training
NO_EXAMPLES = Examples(np.zeros(0), np.zeros(0))  # child processes read the examples themselves


class ProcessPoolTrainer(TrainerWrapper):
    """Wrap a trainer so that several processes share each call of `fit`, and large calls of `predict`.

    This process and ``num_processes - 1`` child processes train one share of a block each. The first block with a new
    local rule forks the children, so they have data, model and local rules without copies. Children write their
    updates into shared memory. This process trains all clients if the optimizer or the schedule is a
    function, or if clients keep the state of the optimizer.

    Args:
        trainer: trainer on the CPU. An update must not depend on the other clients of its block.
        data: source of the examples in the child processes.
        num_processes: number of processes, including this one, >= 2.
        auto: whether this process trains small blocks alone, because communication takes longer than their training;
            default False.

    *Guarantees*:

    - Updates and outputs are bit-identical to the ones of ``trainer``.
    - If a child dies, `fit` raises an error. The next `fit` forks new children.
    - Children end with their parent.
    """

    def __init__(self, trainer: Trainer, data: FederatedData, *, num_processes: int, auto: bool = False) -> None:
        super().__init__(trainer)
        self.data, self.num_processes, self.auto = data, num_processes, auto
        self._team: _Children | None = None
        self._rules: list[LocalRule] = []

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients in all processes. See `Trainer.fit`."""
        sizes = [len(client_work.examples) for client_work in work]
        shares = balance_shares(sizes, self.num_processes)
        has_function = callable(request.local.optimizer) or callable(request.local.schedule)  # no pickle is certain
        keeps = bool(rule.optimizer_state)  # the shared memory has no place for optimizer states
        if has_function or keeps or len(shares) == 1 or (self.auto and not self._is_large(sum(sizes))):
            return self.trainer.fit(request, rule, work)
        if not (self._team and self._team.fits(rule, len(work))):
            self.close()
            self._rules += [rule] if rule not in self._rules else []
            children = self.num_processes - 1
            self._team = _Children(self.trainer, self.data, self._rules, num_children=children, max_clients=len(work))
        try:
            return self._team.fit(request, rule, work, shares)
        except BaseException:
            self.close()  # children may still train this block
            raise

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Return raw outputs ``(N, C)``. All processes share the parts of a large array, after the first `fit`.

        The parts are the parts of the inner trainer, so the outputs are bit-identical.
        """
        parts = prediction_parts(x)
        ready = self._team is not None and self._team.is_alive()
        if not ready or len(parts) == 1 or (self.auto and not self._is_large(len(x))):
            return self.trainer.predict(params_D, x)
        assert self._team is not None
        try:
            return self._team.predict(params_D, parts)
        except Exception:  # a child died: this process computes all parts
            self.close()
            return self.trainer.predict(params_D, x)
        except BaseException:
            self.close()  # children may still compute
            raise

    def with_batching(self, batching: str) -> ProcessPoolTrainer:
        """Return a process pool whose processes train a block in this way."""
        return ProcessPoolTrainer(
            self.trainer.with_batching(batching), self.data, num_processes=self.num_processes, auto=self.auto
        )

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return how a block would be trained: the number of processes, and the batching in each."""
        batching = self.trainer.describe_batching(-(-num_clients // self.num_processes), num_examples)
        alone = num_clients == 1 or (self.auto and not self._is_large(num_examples))
        return batching if alone else f"{self.num_processes} processes, {batching}"

    def _is_large(self, num_examples: int) -> bool:
        """Return whether a block with this many examples trains faster in several processes."""
        return num_examples * self.layout.num_parameters > MIN_PARALLEL_WORK

    def close(self) -> None:
        """End all child processes of the pool."""
        if self._team:
            self._team.close()
            self._team = None


class _Children:
    """Child processes, and the memory that they share with this process.

    Args:
        trainer: trainer that each child runs.
        data: source of the examples.
        rules: local rules that the children have.
        num_children: number of children, >= 1.
        max_clients: maximum number of clients in a block.
    """

    def __init__(
        self, trainer: Trainer, data: FederatedData, rules: Sequence[LocalRule], *, num_children: int, max_clients: int
    ) -> None:
        self.trainer, self.data, self.rules = trainer, data, tuple(rules)
        size = trainer.layout.num_parameters
        self.max_clients, self.params_D = max_clients, np.frombuffer(_shared_memory(size), np.float32)
        # `fit` returns views of the first memory, and copies from the second while a caller still uses such a view
        self.returned_memory = _shared_memory(max_clients * size)
        self.copied_memory = _shared_memory(max_clients * size)
        self._returned: Callable[[], object] = lambda: None
        fork = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self.children = []
        for _ in range(num_children):
            ours, theirs = fork.Pipe()
            child = fork.Process(target=self._serve, args=(theirs, [*self.pipes, ours]), daemon=True)
            child.start()
            theirs.close()
            self.pipes.append(ours)
            self.children.append(child)

    def fits(self, rule: LocalRule, num_clients: int) -> bool:
        """Return whether these children can train a block of this size with this rule."""
        return self.is_alive() and rule in self.rules and num_clients <= self.max_clients

    def is_alive(self) -> bool:
        """Return whether all children run."""
        return all(child.is_alive() for child in self.children)

    def predict(self, params_D: Array, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the outputs for all parts. This process and each child take every n-th part."""
        np.copyto(self.params_D, as_numpy(params_D))
        step = len(self.pipes) + 1
        for number, pipe in enumerate(self.pipes, start=1):
            pipe.send(list(parts[number::step]))
        outputs: list[Any] = [None] * len(parts)
        outputs[0::step] = [self.trainer.predict(params_D, part) for part in parts[0::step]]
        for number, pipe in enumerate(self.pipes, start=1):
            outputs[number::step] = _receive(pipe)
        return np.concatenate(outputs)

    def fit(
        self, request: Request, rule: LocalRule, work: Sequence[ClientWork], shares: Sequence[np.ndarray]
    ) -> Updates:
        """Train all shares, the first one in this process. Return the updates in the order of ``work``.

        The updates are views of shared memory. They are copies if a caller still uses the updates of an earlier block.
        """
        np.copyto(self.params_D, as_numpy(request.params_D))
        small_request, rule_index = replace(request, params_D=None), self.rules.index(rule)
        in_use = self._returned() is not None
        for pipe, rows in zip(self.pipes, shares[1:], strict=False):
            items = [(int(k), work[k]._replace(examples=NO_EXAMPLES)) for k in rows]
            pipe.send((small_request, rule_index, in_use, items))
        parts = [self.trainer.fit(request, rule, [work[k] for k in shares[0]])]
        parts += [_receive(pipe) for pipe, _ in zip(self.pipes, shares[1:], strict=False)]
        delta_KD = self._rows(in_use)[: len(work)]
        delta_KD[shares[0]] = parts[0].delta_KD
        if in_use:
            delta_KD = delta_KD.copy()
        else:
            self._returned = weakref.ref(delta_KD.base)  # alive as long as a view of these rows exists
        order = np.argsort(np.concatenate(shares))
        names = parts[0].metrics
        return Updates(
            clients_K=np.concatenate([part.clients_K for part in parts])[order],
            delta_KD=delta_KD,
            num_examples_K=np.concatenate([part.num_examples_K for part in parts])[order],
            num_steps_K=np.concatenate([part.num_steps_K for part in parts])[order],
            metrics={name: _concatenate([part.metrics[name] for part in parts], order) for name in names},
        )

    def close(self) -> None:
        """End the children, also while they train."""
        for pipe in self.pipes:
            pipe.close()
        for child in self.children:
            child.terminate()
            child.join(timeout=5)

    def _rows(self, in_use: bool) -> np.ndarray:
        """Return shared memory for the updates of a block, ``(max_clients, D)``."""
        memory = self.copied_memory if in_use else self.returned_memory
        return np.frombuffer(memory, np.float32).reshape(self.max_clients, -1)

    def _train(
        self, request: Request, rule: LocalRule, in_use: bool, items: Sequence[tuple[int, ClientWork]]
    ) -> Updates:
        """Train clients in a child, and write their updates into the shared rows."""
        updates = self.trainer.fit(request, rule, [client_work for _, client_work in items])
        self._rows(in_use)[[k for k, _ in items]] = updates.delta_KD
        return replace(updates, delta_KD=None)

    def _serve(self, pipe: Connection, others: Sequence[Connection]) -> None:
        """Train and predict in a child until the parent closes the pipe."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in others:  # a pipe that stays open here would not report the end of the parent
            other.close()
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                pipe.send(self._respond(message))
            except Exception as error:
                pipe.send(error)

    def _respond(self, message: Any) -> Any:
        """Return outputs for a list of inputs, or updates for a request."""
        if isinstance(message, list):
            return [self.trainer.predict(self.params_D, part) for part in message]
        small_request, rule_index, in_use, small_items = message
        request = replace(small_request, params_D=self.params_D.copy())
        items = [(k, item._replace(examples=self.data.train(item.client))) for k, item in small_items]
        return self._train(request, self.rules[rule_index], in_use, items)


def _shared_memory(size: int) -> mmap.mmap:
    """Return shared memory for ``size`` float32 numbers. The system allocates a page when a process writes to it."""
    return mmap.mmap(-1, 4 * size)


def _receive(pipe: Connection) -> Any:
    """Return the updates or the outputs of a child.

    Raises:
        RuntimeError: The child died.
        Exception: The error of the child's trainer.
    """
    try:
        result: Any = pipe.recv()
    except EOFError as error:
        raise RuntimeError(
            "a process of the pool died, perhaps because memory ran out\n  advice    fewer processes, or batching=map"
        ) from error
    if isinstance(result, Exception):
        raise result
    return result


def _concatenate(sums: Sequence[MetricSum], order: np.ndarray) -> MetricSum:
    totals, counts = (np.concatenate([getattr(s, name) for s in sums])[order] for name in ("total_K", "count_K"))
    return MetricSum(totals, counts)
