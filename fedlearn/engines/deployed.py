"""Train on the clients of real nodes, over Flower's `Grid`.

Shapes: C model outputs, D parameters.

The coordinator needs neither data nor a framework: layout, task, names and initial parameters come from the nodes.
Clients have stable ids, which each node sends when it joins; Flower's node ids are only addresses. Client states stay
on the disks of the nodes. `DeployedEngine.client_states` holds only the round of the last accepted update of each
client. The client continues from its state of that round, so a repeated round starts from the same state.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientId,
    Failure,
    FailureStage,
    InFlight,
    Request,
    Updates,
    sorted_client_ids,
)
from fedlearn.errors import MissingExtra, SettingError, is_count, is_number, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.protocols import Completion, Trainer
from fedlearn.loop.system_model import refuse_early_end

try:
    from flwr.serverapp import Grid

    from fedlearn.protocol.cohort_request import CohortRequest, evaluation_request, training_request
    from fedlearn.protocol.exchange import NOT_CONNECTED, Exchange
    from fedlearn.protocol.fields import client_of
    from fedlearn.protocol.grid_client import GridClient
    from fedlearn.protocol.membership import FederationError
except ModuleNotFoundError as error:
    raise MissingExtra("engine=grid", "flower") from error

SETTING_GROUPS = ("scenario", "strategy", "privacy", "compress", "buffers")
log = logging.getLogger(__name__)


@engine_builder(deployed=True, needs_coordinator=True)
def grid(
    data: FederatedData,
    trainer: Trainer,
    *,
    num_nodes: int | None = None,
    join_timeout: float = 120.0,
    deadline: float = 600.0,
    min_updates: int = 1,
    min_completed: int | None = None,
) -> DeployedEngine:
    """Refuse ``engine=grid`` in a simulation, which has no nodes.

    Args:
        data: not used.
        trainer: not used.
        num_nodes: see `DeployedEngine`; None: all nodes that may join, as the coordinator counts them.
        join_timeout: see `DeployedEngine`.
        deadline: see `DeployedEngine`.
        min_updates: see `DeployedEngine`.
        min_completed: see `DeployedEngine`.

    Raises:
        SettingError: always, with the command that deploys.
    """
    fix = "python -m fedlearn.deploy.submit ..."
    raise SettingError("_target_", "grid", "serial, vector or ray in a simulation", fix)


class DeployedEngine(BaseEngine):
    """An engine that trains on the clients of connected nodes.

    Args:
        grid: Flower's connection to the nodes.
        settings: ``scenario`` and ``strategy`` as plain settings with their ``_target_``; each node builds its own.
            Optional: ``compress`` in the same form; ``buffers``, the policy for buffers; ``privacy`` (`set_privacy`).
        run: name of the run, equal after a restart of the coordinator; nodes keep client states under this name.
        num_nodes: number of nodes to wait for at the start, >= 1.
        join_timeout: seconds to wait for these nodes, and in a round for nodes of the cohort, > 0.
        deadline: seconds after which a request to a node counts as failed, > 0.
        min_updates: number of updates without which a round stops the run, >= 1.
        min_completed: number of updates that close a round. The other clients of the cohort are not needed then. None
            waits for all.

    Attributes:
        exchange: requests and responses.
        membership: nodes that have joined.

    Raises:
        SettingError: a setting is out of range.
    """

    deployed = True

    def __init__(
        self,
        grid: Grid,
        settings: Mapping[str, Any],
        *,
        run: str,
        num_nodes: int = 1,
        join_timeout: float = 120.0,
        deadline: float = 600.0,
        min_updates: int = 1,
        min_completed: int | None = None,
    ) -> None:
        for name, value in (("num_nodes", num_nodes), ("min_updates", min_updates)):
            require(is_count(value), f"engine.{name}", value, "a whole number >= 1", f"engine.{name}=2")
        for name, seconds in (("join_timeout", join_timeout), ("deadline", deadline)):
            ok = is_number(seconds, at_least=0) and 0 < seconds < float("inf")
            require(ok, f"engine.{name}", seconds, "a number of seconds > 0", f"engine.{name}=120")
        ok = min_completed is None or is_count(min_completed, at_least=min_updates)
        expected = f"null, or a whole number >= min_updates={min_updates}"
        require(ok, "engine.min_completed", min_completed, expected, "engine.min_completed=null")
        self.num_nodes, self.join_timeout = num_nodes, join_timeout
        self.min_updates, self.min_completed = min_updates, min_completed
        used = {group: settings[group] for group in SETTING_GROUPS if settings.get(group)}
        self.exchange = Exchange(GridClient(grid), used, run=run, timeout_s=deadline)
        self.membership = self.exchange.membership
        super().__init__((), Layout(()))
        self._session_name = f"{run}/{secrets.token_hex(8)}"
        self._round = 0

    def open(self) -> None:
        """Wait for the nodes to join; return at once if they have joined before.

        Raises:
            FederationError: too few nodes joined in time, a node refuses the settings, or the models differ.
        """
        if not self.clients:
            self.exchange.wait_for_nodes(self.num_nodes, timeout_s=self.join_timeout)
            self.layout = self.exchange.layout
            self._add_clients()

    def set_privacy(self, settings: Mapping[str, Any], *, rounds: int) -> None:
        """Send the privacy settings to nodes with each further request, so that they protect their updates.

        Args:
            settings: settings of the mechanism, with its ``_target_`` and the calibrated noise multiplier.
            rounds: planned number of rounds.
        """
        population = {"num_clients": len(self.clients), "rounds": rounds}
        privacy = {"privacy": dict(settings), "population": population}
        self.exchange.settings = {**self.exchange.settings, **privacy}

    def initial_parameters(self, seed: int) -> np.ndarray:
        """Return ``params_D`` before the first round, from the node of the lowest client.

        Raises:
            FederationError: this node fails.
        """
        self.open()
        params_D: np.ndarray = self.exchange.initial_parameters(self.clients[0], seed, self._round)
        return params_D

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort. Yield a result per client in ascending order, or the sum of masked updates.

        Raises:
            FederationError: fewer than ``min_updates`` clients delivered an update by the deadline.
            SettingError: the privacy guarantee does not allow a round that closes early.
        """
        refuse_early_end(strategy, self.min_completed, "engine.min_completed")
        self.open()
        self._round = request.round
        needed = min(self.min_updates, len(cohort))  # a Poisson cohort may be empty
        self.exchange.wait_for_clients(cohort, needed, round=request.round, timeout_s=self.join_timeout)
        self._add_clients()
        results: Iterator[Any] = (
            self._fit_masked(request, strategy, cohort)
            if any(stage.needs_sum for stage in strategy.stages)
            else self.exchange.run_cohort(self._training_request(request, strategy, cohort))
        )
        accepted, failures = 0, list[Failure]()
        for result in results:
            if isinstance(result, Failure):
                failures += [result] if result.stage.counts_as_failure else []
            else:
                clients = result.clients if isinstance(result, PartialAggregate) else [client_of(result)]
                accepted += len(clients)
                self._accept(request, clients)
            yield result
        if accepted < needed:
            first = "; ".join(f"client {f.client}, at stage {f.stage}: {f.reason}" for f in failures[:5])
            few = f"round {request.round} has {accepted} updates, fewer than engine.min_updates={self.min_updates}"
            raise FederationError(f"{few} ({first})")

    def wait_for_next(self, strategy: Strategy, in_flight: Sequence[InFlight], clock: float) -> Completion:
        """Send the new ones of these requests, and wait for the next completion, in wall-clock time.

        Raises:
            SettingError: ``min_completed`` is set, but an asynchronous strategy has no rounds to close.
        """
        expected, fix = "null: an asynchronous strategy has strategy.buffer_size", "engine.min_completed=null"
        require(self.min_completed is None, "engine.min_completed", self.min_completed, expected, fix)
        began = time.monotonic()
        self.open()
        indices = {(flight.client, flight.request.round): index for index, flight in enumerate(in_flight)}
        self.exchange.cancel_except(indices)
        for (client, _), index in indices.items():
            if not self._start(strategy, in_flight[index]):
                failure = Failure(client=client, stage=FailureStage.NODE, reason=NOT_CONNECTED)
                return Completion(index, failure, clock + time.monotonic() - began)
        key, result = self.exchange.wait_for_next()
        index = indices[key]
        if isinstance(result, Updates):
            self._accept(in_flight[index].request, [client_of(result)])
        return Completion(index, result, clock + time.monotonic() - began)

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[ClientEvaluation | Failure]:
        """Yield the metric sums of each client on its held-out part; outputs and targets stay at the node."""
        model, rounds = self.membership.require_same_model(), self._state_rounds(cohort)
        request = evaluation_request(
            params_D, cohort, model, round=self._round, state_rounds=rounds if personal_strategy else None
        )
        for result in self.exchange.run_cohort(request):
            yield replace(result, stage=FailureStage.EVALUATE) if isinstance(result, Failure) else result

    def describe(self, cohort_size: int) -> str:
        """Return the number of nodes by framework, and the deadline."""
        counts = Counter(member.framework for member in self.membership.present.values())
        nodes = ", ".join(f"{count} with {framework}" for framework, count in sorted(counts.items()))
        return f"{len(self.membership.present)} nodes ({nodes}), deadline {self.exchange.timeout_s:g} s"

    def close(self) -> None:
        """Log the number of ignored responses; Flower closes the connections."""
        if self.exchange.grid_client.num_ignored:
            causes = self.exchange.grid_client.num_ignored.items()
            log.warning("ignored responses: %s", ", ".join(f"{count} {cause}" for cause, count in causes))

    def _training_request(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> CohortRequest[Updates | Failure]:
        return training_request(
            request,
            strategy,
            self.layout,
            members=self.membership.members_by_client(),
            state_rounds=self._state_rounds(cohort),
            min_completed=self.min_completed,
        )

    def _fit_masked(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[PartialAggregate | Failure]:
        try:
            from fedlearn.engines.secure_round import run_secure_round
        except ModuleNotFoundError as error:
            raise MissingExtra("secure aggregation", "privacy") from error
        rounds, name = self._state_rounds(cohort), self._session_name
        yield from run_secure_round(self.exchange, request, strategy, cohort, session_name=name, state_rounds=rounds)

    def _start(self, strategy: Strategy, flight: InFlight) -> bool:
        """Send a request if it is new and its node is free; return False if no node has the client."""
        key = (flight.client, flight.request.round)
        if self.exchange.is_in_flight(key):
            return True
        if flight.client not in self.membership.members_by_client() or flight.request.round != self._round:
            self._round = flight.request.round
            self.exchange.update_members(self._round)
            self._add_clients()
        member = self.membership.members_by_client().get(flight.client)
        if member is not None and not self.exchange.grid_client.is_busy(member.node_id):
            self.exchange.start(key, self._training_request(flight.request, strategy, [flight.client]))
        return member is not None

    def _add_clients(self) -> None:
        self.clients = sorted_client_ids(list({*self.clients, *self.membership.members_by_client()}))

    def _state_rounds(self, clients: Iterable[ClientId]) -> dict[ClientId, int]:
        """Return the round of the last accepted update of each client; 0 for a client without one."""
        states = self.client_states
        return {client: int(states[client]["round"]) if client in states else 0 for client in clients}

    def _accept(self, request: Request, clients: Iterable[ClientId]) -> None:
        self.client_states |= {client: {"round": np.array(request.round, np.int64)} for client in clients}
