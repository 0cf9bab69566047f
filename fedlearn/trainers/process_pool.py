"""Run a trainer in several processes: each core trains its share of a block, in one thread.

The pool forks its processes and shares memory with them. A pool of loky (joblib 1.6.0) pickles the updates: a block of
16 clients with a million parameters then takes 198 ms without any training, and 22 ms here (two processes).

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
from fedlearn.core.records import ClientWork, Examples, MetricSum, Request, Updates
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.wrappers import TrainerWrapper
from fedlearn.trainers.batching import balance_shares

MIN_PARALLEL_WORK = 10_000_000  # examples times parameters: a few milliseconds of training
NO_EXAMPLES = Examples(np.zeros(0), np.zeros(0))  # children have their own


class ProcessPoolTrainer(TrainerWrapper):
    """Wrap a trainer so that this process and ``num_workers - 1`` forked ones share each `fit`.

    Children are forked at the first block under a rule: they have data, model and local rules without any copying, and
    write updates where this process reads them.

    Args:
        trainer: computes on the CPU, and gives a client the same alone and in a block.
        data: where children find the examples of the clients that they are told.
        num_processes: processes, this one included, >= 2.
        auto: leave small blocks, which are done before children have been told of them, to this process.

    *Guarantees*: bit-identical to ``trainer`` alone. If a child dies, `fit` raises, and the next one forks anew.
    Children end with their parent.
    """

    def __init__(self, trainer: Trainer, data: FederatedData, *, num_processes: int, auto: bool = False) -> None:
        super().__init__(trainer)
        self.data, self.num_processes, self.auto = data, num_processes, auto
        self._team: _Team | None = None
        self._rules: list[LocalRule] = []

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients; see `Trainer.fit`."""
        sizes = [len(one.examples) for one in work]
        shares = balance_shares(sizes, self.num_processes)
        if len(shares) == 1 or (self.auto and not self._pays(sum(sizes))):
            return self.trainer.fit(request, rule, work)
        if not (self._team and self._team.fits(rule, len(work))):
            self.close()
            self._rules += [rule] if rule not in self._rules else []
            children = self.num_processes - 1
            self._team = _Team(self.trainer, self.data, self._rules, num_children=children, room=len(work))
        try:
            return self._team.fit(request, rule, work, shares)
        except BaseException:
            self.close()  # some children may still be at work on this block
            raise

    def with_batching(self, batching: str) -> ProcessPoolTrainer:
        """Workers around the trainer batched so."""
        return ProcessPoolTrainer(
            self.trainer.with_batching(batching), self.data, num_processes=self.num_processes, auto=self.auto
        )

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """How a block would be trained."""
        within = self.trainer.describe_batching(-(-num_clients // self.num_processes), num_examples)
        alone = num_clients == 1 or (self.auto and not self._pays(num_examples))
        return within if alone else f"{self.num_processes} workers, {within}"

    def _pays(self, num_examples: int) -> bool:
        return num_examples * self.layout.num_parameters > MIN_PARALLEL_WORK

    def close(self) -> None:
        """End the children."""
        if self._team:
            self._team.close()
            self._team = None


class _Team:
    """Forked children, who know some local rules, and the memory that they share with this process."""

    def __init__(
        self, trainer: Trainer, data: FederatedData, rules: Sequence[LocalRule], *, num_children: int, room: int
    ) -> None:
        self.trainer, self.data, self.rules = trainer, data, tuple(rules)
        size = trainer.layout.num_parameters
        self.room, self.params_D = room, np.frombuffer(_shared(size), np.float32)
        self.to_lend, self.to_copy = _shared(room * size), _shared(room * size)
        self._lent: Callable[[], object] = lambda: None
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
        """Whether these children can train such a block."""
        alive = all(child.is_alive() for child in self.children)
        return alive and rule in self.rules and num_clients <= self.room

    def fit(self, order: Request, rule: LocalRule, work: Sequence[ClientWork], shares: Sequence[np.ndarray]) -> Updates:
        """Share the block out, take part in it, and put the parts together in the order of ``work``.

        The updates lie where the children have put them, unless somebody still holds the last ones that lay there.
        """
        np.copyto(self.params_D, as_numpy(order.params_D))
        told, number = replace(order, params_D=None), self.rules.index(rule)
        held = self._lent() is not None
        for pipe, rows in zip(self.pipes, shares[1:], strict=False):
            pipe.send((told, number, held, [(int(k), work[k]._replace(examples=NO_EXAMPLES)) for k in rows]))
        parts = [self.trainer.fit(order, rule, [work[k] for k in shares[0]])]
        parts += [_received(pipe) for pipe, _ in zip(self.pipes, shares[1:], strict=False)]
        delta_KD = self._rows(held)[: len(work)]
        delta_KD[shares[0]] = parts[0].delta_KD
        if held:
            delta_KD = delta_KD.copy()
        else:
            self._lent = weakref.ref(delta_KD.base)  # every view of these rows keeps it alive
        back = np.argsort(np.concatenate(shares))
        names = parts[0].metrics
        return Updates(
            clients_K=np.concatenate([part.clients_K for part in parts])[back],
            delta_KD=delta_KD,
            num_examples_K=np.concatenate([part.num_examples_K for part in parts])[back],
            num_steps_K=np.concatenate([part.num_steps_K for part in parts])[back],
            metrics={name: _joined([part.metrics[name] for part in parts], back) for name in names},
        )

    def close(self) -> None:
        """End the children, busy or not."""
        for pipe in self.pipes:
            pipe.close()
        for child in self.children:
            child.terminate()
            child.join(timeout=5)

    def _rows(self, held: bool) -> np.ndarray:
        """Shared memory for the updates of a block (room, D)."""
        memory = self.to_copy if held else self.to_lend
        return np.frombuffer(memory, np.float32).reshape(self.room, -1)

    def _train(self, order: Request, rule: LocalRule, held: bool, rows: Sequence[tuple[int, ClientWork]]) -> Updates:
        """In a child: train some clients, leaving their updates in the shared rows."""
        updates = self.trainer.fit(order, rule, [one for _, one in rows])
        self._rows(held)[[k for k, _ in rows]] = updates.delta_KD
        return replace(updates, delta_KD=None)

    def _serve(self, pipe: Connection, others: Sequence[Connection]) -> None:
        """The life of a child: until its pipe is closed, train what it is told."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in others:  # else the pipe would stay open when the parent is gone
            other.close()
        while True:
            try:
                told, number, held, told_work = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                order = replace(told, params_D=self.params_D.copy())
                rows = [(k, one._replace(examples=self.data.train(one.client))) for k, one in told_work]
                pipe.send(self._train(order, self.rules[number], held, rows))
            except Exception as error:
                pipe.send(error)


def _shared(size: int) -> mmap.mmap:
    """Memory for float32 numbers that forked children share; it takes up none until it is written to."""
    return mmap.mmap(-1, 4 * size)


def _received(pipe: Connection) -> Updates:
    try:
        answer: Any = pipe.recv()
    except EOFError as error:
        raise RuntimeError("a worker process died while training (out of memory?)") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _joined(sums: Sequence[MetricSum], back: np.ndarray) -> MetricSum:
    totals, counts = (np.concatenate([getattr(s, name) for s in sums])[back] for name in ("total_K", "count_K"))
    return MetricSum(totals, counts)
