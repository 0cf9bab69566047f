"""Train blocks of clients, in this process or in a process of a pool.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

import logging
import traceback
from bdb import BdbQuit
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import ClientId, ClientWork, Failure, FailureStage, Request, State, Updates
from fedlearn.errors import SettingError
from fedlearn.loop.client_update import client_step, client_step_mixed_rounds, initial_client_state
from fedlearn.loop.protocols import Trainer

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Clients that train together.

    Attributes:
        clients: ids of the clients, ascending.
        requests: the request to all clients, or one request per client from different rounds.
        client_states: client states by id. Clients that are not in it have the initial state.
        is_mixed: whether each client has a request from another round.
    """

    clients: Sequence[ClientId]
    requests: Sequence[Request]
    client_states: Mapping[ClientId, State] = field(default_factory=dict)
    is_mixed: bool = False


class BlockTrainer:
    """Train blocks of clients, and turn errors of clients into failures.

    Args:
        data: examples of each client.
        trainer: trainer of the model.
        raise_failures: True raises the exception of the first client that fails. False returns a `Failure`.
    """

    def __init__(self, data: FederatedData, trainer: Trainer, *, raise_failures: bool = False) -> None:
        self.data, self.trainer = data, trainer
        self._raised: tuple[type[Exception], ...] = (Exception,) if raise_failures else (BdbQuit,)
        self._raised_in_training = (SettingError, *self._raised)

    def train(self, strategy: Strategy, block: Block) -> Iterator[Updates | Failure]:
        """Yield the failures of a block, and the updates of all other clients."""
        if block.is_mixed:
            yield from self._train_mixed_rounds(strategy, block)
            return
        request, work = block.requests[0], []
        initial = initial_client_state(strategy, self.trainer.layout, request.params_D)
        for client in block.clients:
            try:
                work.append(self._work(client, block.client_states.get(client, initial)))
            except self._raised:
                raise
            except Exception as error:
                yield failure(client, FailureStage.DATA, error)
        if work:
            yield from self._train_work(strategy, request, work)

    def _work(self, client: ClientId, state: State) -> ClientWork:
        examples = self.data.train(client)
        if not len(examples):
            raise ValueError(f"client {self.data.name(client)} has no training examples")
        return ClientWork(client=client, examples=examples, client_state=state)

    def _train_work(
        self, strategy: Strategy, request: Request, work: Sequence[ClientWork]
    ) -> Iterator[Updates | Failure]:
        try:
            updates, failures = client_step(self.trainer, strategy, request, work)
        except self._raised_in_training as error:  # a setting is wrong for all clients, or a person debugs
            if self._raised == (Exception,):
                traceback.print_exception(error)
                raise (error.__cause__ or error) from None  # the exception of the user's code
            raise
        except Exception as error:
            if len(work) == 1:
                yield failure(work[0].client, FailureStage.FIT, error)
                return
            _log_halves(len(work), error)
        else:
            yield from failures
            if len(updates):
                yield updates
            return
        # after the handler, because the traceback of the error keeps the memory of the block
        for half in _halves(work):
            yield from self._train_work(strategy, request, half)

    def _train_mixed_rounds(self, strategy: Strategy, block: Block) -> Iterator[Updates | Failure]:
        requests, work = [], []
        for client, request in zip(block.clients, block.requests, strict=True):
            try:
                initial = initial_client_state(strategy, self.trainer.layout, request.params_D)
                work.append(self._work(client, block.client_states.get(client, initial)))
                requests.append(request)
            except self._raised:
                raise
            except Exception as error:
                yield failure(client, FailureStage.DATA, error)
        if work:
            yield from self._train_mixed_work(strategy, requests, work)

    def _train_mixed_work(
        self, strategy: Strategy, requests: Sequence[Request], work: Sequence[ClientWork]
    ) -> Iterator[Updates | Failure]:
        if len(work) == 1:
            yield from self._train_work(strategy, requests[0], work)
            return
        try:
            results = client_step_mixed_rounds(self.trainer, strategy, requests, work)
        except self._raised_in_training:
            raise
        except Exception as error:
            _log_halves(len(work), error)
        else:
            yield from results
            return
        for half, half_requests in zip(_halves(work), _halves(requests), strict=True):
            yield from self._train_mixed_work(strategy, half_requests, half)


def _halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Return the halves of at least two items. Halving a failed block ends at the client that fails."""
    middle = len(items) // 2
    return items[:middle], items[middle:]


def _log_halves(num_clients: int, error: Exception) -> None:
    """Log that a block failed, e.g. because the memory of the device ran out."""
    reason = (str(error).splitlines() or [""])[0]
    log.warning(
        "a block of %d clients failed, so each half of it is trained alone (%s: %s); "
        "if memory ran out, use a smaller engine.block_size",
        num_clients,
        type(error).__name__,
        reason,
    )


def block_slices(num_clients: int, number: int) -> list[slice]:
    """Divide clients into a number of blocks whose sizes differ by one client at most."""
    ends = np.linspace(0, num_clients, min(number, num_clients) + 1).round().astype(int).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def failure(client: ClientId, stage: FailureStage, error: Exception) -> Failure:
    """Return the `Failure` of one client for an exception, with its traceback."""
    reason = f"{type(error).__name__}: {error}"
    return Failure(client=client, stage=stage, reason=reason, traceback=traceback.format_exc())
