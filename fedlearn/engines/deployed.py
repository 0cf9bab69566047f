"""Train on the clients of real nodes, over Flower's `Grid`.

Shapes: C model outputs, D parameters.

The coordinator needs no data and no framework: nodes send layout, task, names and initial parameters. Clients have
stable ids, which each node sends when it joins. Flower's node ids are only addresses. Client states stay on the disks
of the nodes. `DeployedEngine.client_states` has only the round of the last accepted update of each client. The client
starts from its state of this round, so a repeated round starts from the same state.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.metric import Metric
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
from fedlearn.core.tasks import Task, as_task
from fedlearn.errors import MissingExtra, SettingError, is_count, is_number, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.protocols import Completion, Trainer
from fedlearn.loop.system_model import refuse_early_end

try:
    from flwr.serverapp import Grid

    from fedlearn.protocol.cohort_request import CohortRequest, evaluation_request, training_request
    from fedlearn.protocol.exchange import Exchange
    from fedlearn.protocol.fields import client_of
    from fedlearn.protocol.grid_client import GridClient
    from fedlearn.protocol.membership import FederationError, Member
    from fedlearn.protocol.repetition import Repetition
    from fedlearn.protocol.sites import RunSites
except ModuleNotFoundError as error:
    raise MissingExtra("engine=grid", "flower") from error

SETTING_GROUPS = ("scenario", "strategy", "privacy", "compress", "buffers", "metrics")
log = logging.getLogger(__name__)


@engine_builder(deployed=True, needs_coordinator=True)
def grid(
    data: FederatedData,
    trainer: Trainer,
    *,
    join_timeout: float = 120.0,
    deadline: float = 600.0,
    min_updates: int = 1,
    min_completed: int | None = None,
) -> DeployedEngine:
    """Refuse ``engine=grid`` in a simulation, which has no nodes.

    Args:
        data: not used.
        trainer: not used.
        join_timeout: see `DeployedEngine`.
        deadline: see `DeployedEngine`.
        min_updates: see `DeployedEngine`.
        min_completed: see `DeployedEngine`.

    Raises:
        SettingError: Always; the error names the command for a deployment.
    """
    expected = "serial, vector or ray in a simulation; fedlearn.deploy.submit starts a deployed run"
    fix = "engine=vector"
    raise SettingError("_target_", "grid", expected, fix)


class DeployedEngine(BaseEngine):
    """Train the clients of connected nodes.

    Args:
        grid: Flower's connection to the nodes.
        settings: ``scenario`` and ``strategy``, each with the ``name`` of an option and its values, from which each
            node builds both. Optional: ``compress`` in the same form; ``buffers``, the policy for buffers; ``privacy``
            (`set_privacy`); ``metrics``, names of metrics that the operators have registered.
        run: name of the run, equal after a restart of the coordinator; nodes keep client states under this name.
        sites: sites of the run, and the rule for its start; default: all sites, at least one of them.
        join_timeout: seconds to wait for the sites at the start, and in a round for nodes of the cohort, > 0, default
            120.
        deadline: seconds after which a request to a node counts as failed, > 0, default 600.
        min_updates: smallest number of updates of a round, >= 1, default 1; a round with fewer updates stops the run.
        min_completed: number of updates that close a round, >= ``min_updates``. The round then does not wait for the
            other clients of the cohort. None: wait for all clients.
        check_member: function that raises `WireError` for a node that may not have its clients.
        find_task: function from the name of a task to the task; default the shipped tasks.
        metrics: metrics of the user in the settings, in their order.
        connected_since: function that returns the start of the connection of each node as a Unix time, by Flower's id.
            A request is sent again to a node that has connected anew since.
        folder: folder on a disk for large responses; None: the system's folder for temporary files.

    Attributes:
        exchange: connection for requests and responses.
        membership: nodes that have joined.

    Raises:
        SettingError: A setting is out of range.
    """

    deployed = True

    def __init__(
        self,
        grid: Grid,
        settings: Mapping[str, Any],
        *,
        run: str,
        sites: RunSites | None = None,
        join_timeout: float = 120.0,
        deadline: float = 600.0,
        min_updates: int = 1,
        min_completed: int | None = None,
        check_member: Callable[[Member], None] = lambda member: None,
        find_task: Callable[[str], Task] = as_task,
        metrics: Sequence[Metric] = (),
        connected_since: Callable[[], Mapping[int, float]] = dict,
        folder: Path | None = None,
    ) -> None:
        require(is_count(min_updates), "engine.min_updates", min_updates, "a whole number >= 1", "engine.min_updates=2")
        for name, seconds in (("join_timeout", join_timeout), ("deadline", deadline)):
            is_valid = is_number(seconds, at_least=0) and 0 < seconds < float("inf")
            require(is_valid, f"engine.{name}", seconds, "a number of seconds > 0", f"engine.{name}=120")
        is_valid = min_completed is None or is_count(min_completed, at_least=min_updates)
        expected = f"null, or a whole number >= min_updates={min_updates}"
        require(is_valid, "engine.min_completed", min_completed, expected, "engine.min_completed=null")
        self.join_timeout, self.sites = join_timeout, sites or RunSites()
        self.min_updates, self.min_completed = min_updates, min_completed
        used = {group: settings[group] for group in SETTING_GROUPS if settings.get(group)}
        repetition = Repetition(connected_since, self._report_repetition)
        self.exchange = Exchange(
            GridClient(grid, self.sites.name, repetition, folder=folder),
            used,
            run=run,
            timeout_s=deadline,
            check_member=check_member,
            find_task=find_task,
            sites=self.sites,
        )
        self.membership = self.exchange.membership
        super().__init__((), Layout(()))
        self._session_name = f"{run}/{secrets.token_hex(8)}"
        self._round, self._metrics, self._is_population_fixed = 0, tuple(metrics), False

    def open(self) -> None:
        """Wait until enough sites have joined; return at once if they have joined before.

        Raises:
            FederationError: Too few sites joined in time, or too many sites refuse.
        """
        if not self.clients:
            self.exchange.wait_for_sites(timeout_s=self.join_timeout)
            self.layout = self.exchange.layout
            self._add_clients()

    @property
    def num_parties(self) -> int:
        """Number of parties of secure aggregation: distinct masking keys of the nodes, at least 1."""
        return self.membership.num_parties

    @property
    def task(self) -> Task:
        """Task of the connected nodes, with the metrics of the user."""
        return self.membership.task_of(self.membership.model).with_metrics(self._metrics)

    def set_privacy(self, settings: Mapping[str, Any], *, rounds: int) -> None:
        """Send the settings of a privacy mechanism to the nodes with each further request.

        The mechanism is for the present clients, so clients that join later take no part.

        Args:
            settings: settings of the mechanism, with its ``name`` and the calibrated noise multiplier.
            rounds: planned number of rounds.
        """
        population = {"num_clients": len(self.clients), "rounds": rounds, "num_parties": self.num_parties}
        privacy = {"privacy": dict(settings), "population": population}
        self.exchange.settings = {**self.exchange.settings, **privacy}
        self._is_population_fixed = True

    def initial_parameters(self, seed: int) -> np.ndarray:
        """Return ``params_D`` before the first round, from the site of the client with the lowest id.

        If this site fails, the next site draws the parameters from the same seed.

        Raises:
            FederationError: All sites fail or refuse the request.
        """
        self.open()
        problems = []
        for member in sorted(self.membership.present.values(), key=lambda member: member.clients):
            try:
                params_D: np.ndarray = self.exchange.initial_parameters(member.clients[0], seed, self._round)
                return params_D
            except FederationError as error:
                log.warning("%s", error)
                problems.append(str(error))
        raise FederationError("\n".join(problems) or "no site is connected")

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort, and yield a result per client in ascending order, or the sum of masked updates.

        Raises:
            FederationError: Fewer than ``min_updates`` updates arrived before the deadline.
            SettingError: The privacy guarantee does not allow a round that closes early.
        """
        refuse_early_end(strategy, self.min_completed, "engine.min_completed")
        self.open()
        self._round = request.round
        needed = min(self.min_updates, len(cohort))  # a Poisson cohort may be empty
        wait_s = self.exchange.timeout_s
        self.exchange.wait_for_expected(cohort, self.min_completed, round=request.round, timeout_s=wait_s)
        self.exchange.wait_for_clients(cohort, needed, round=request.round, timeout_s=self.join_timeout)
        self._add_clients()
        results: Iterator[Any] = (
            self._fit_masked(request, strategy, cohort)
            if any(stage.needs_sum for stage in strategy.stages)
            else self.exchange.run_cohort(self._training_request(request, strategy, cohort))
        )
        num_accepted, failures = 0, list[Failure]()
        for result in results:
            if isinstance(result, Failure):
                if result.stage == FailureStage.NODE:  # it missed the deadline; the next round does not wait for it
                    self.membership.expected.discard(result.client)
                failures += [result] if result.stage.counts_as_failure else []
            else:
                clients = result.clients if isinstance(result, PartialAggregate) else [client_of(result)]
                num_accepted += len(clients)
                self._accept(request, clients)
            yield result
        if num_accepted < needed:
            first = "; ".join(f"client {f.client}, at stage {f.stage}: {f.reason}" for f in failures[:5])
            problem = f"round {request.round} has {num_accepted} updates"
            raise FederationError(f"{problem}, fewer than engine.min_updates={self.min_updates} ({first})")

    def wait_for_next(self, strategy: Strategy, in_flight: Sequence[InFlight], clock: float) -> Completion:
        """Send these requests unless they are in flight, and wait for the next completion, in wall-clock time.

        Args:
            strategy: asynchronous strategy.
            in_flight: all requests that must be in flight; other requests are cancelled.
            clock: time of the run so far, in seconds.

        Raises:
            SettingError: ``min_completed`` is set, but an asynchronous strategy has no rounds to close.
        """
        expected, fix = "null, because an asynchronous strategy has strategy.buffer_size", "engine.min_completed=null"
        require(self.min_completed is None, "engine.min_completed", self.min_completed, expected, fix)
        start = time.monotonic()
        self.open()
        indices = {(flight.client, flight.request.round): index for index, flight in enumerate(in_flight)}
        self.exchange.cancel_except(indices)
        for (client, _), index in indices.items():
            if not self._start(strategy, in_flight[index]):
                failure = Failure(client=client, stage=FailureStage.NODE, reason=self.membership.absence_of(client))
                return Completion(index, failure, clock + time.monotonic() - start)
        key, result = self.exchange.wait_for_next()
        index = indices[key]
        if isinstance(result, Updates):
            self._accept(in_flight[index].request, [client_of(result)])
        return Completion(index, result, clock + time.monotonic() - start)

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[ClientEvaluation | Failure]:
        """Yield the metric sums of each client on its held-out part; outputs and targets stay at the node.

        Clients of nodes whose policy keeps metrics are left out.
        """
        members = self.membership.members_by_client()
        cohort = [client for client in cohort if client not in members or members[client].supports_metrics]
        model, rounds = self.membership.model, self._state_rounds(cohort)
        request = evaluation_request(
            params_D,
            cohort,
            (self.task, model.num_classes),
            round=self._round,
            state_rounds=rounds if personal_strategy else None,
        )
        for result in self.exchange.run_cohort(request):
            yield replace(result, stage=FailureStage.EVALUATE) if isinstance(result, Failure) else result

    def describe(self, cohort_size: int) -> str:
        """Return the names of the sites, the number of sites by framework, and the deadline."""
        members = self.membership.present.values()
        counts = Counter(member.framework for member in members)
        frameworks = ", ".join(f"{count} with {framework}" for framework, count in sorted(counts.items()))
        names = ", ".join(sorted(member.site for member in members))
        return f"{len(members)} sites: {names} ({frameworks}), deadline {self.exchange.timeout_s:g} s"

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
        """Send a request if it is not in flight and its node is free. Return False if no node has the client."""
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

    def _report_repetition(self, node_id: int, text: str) -> None:
        line = f"{self.sites.name(node_id)} {text}"
        log.warning(line)
        self.sites.report(f"waiting    {line}")

    def _add_clients(self) -> None:
        """Add the clients of new members, unless a privacy guarantee is for the clients of the start."""
        if not self._is_population_fixed:
            self.clients = sorted_client_ids(list({*self.clients, *self.membership.members_by_client()}))
        members = self.membership.present.values()
        self.sites.on_join([member.site for member in members if not set(member.clients).isdisjoint(self.clients)])

    def _state_rounds(self, clients: Iterable[ClientId]) -> dict[ClientId, int]:
        """Return the round of the last accepted update of each client; 0 for a client without one."""
        states = self.client_states
        return {client: int(states[client]["round"]) if client in states else 0 for client in clients}

    def _accept(self, request: Request, clients: Iterable[ClientId]) -> None:
        self.client_states |= {client: {"round": np.array(request.round, np.int64)} for client in clients}
