"""The engine for real clients: it sends requests over a Flower `Grid`, and checks each response before use.

Shapes: K clients of a node, C model outputs, D parameters.

The coordinator needs neither data nor a framework: layout, task, names and initial parameters come from the nodes.
Every wait ends at a deadline with a named cause. Clients have stable ids, which each node sends when it joins; Flower's
node ids are only addresses. Client states stay on the disks of the nodes. `GridEngine.client_states` holds only the
round of the last accepted update of each client. The client continues from its state of that round, so a round that is
repeated after a restart starts from the same state.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy, extra_names
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.metrics import evaluate_client
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientId,
    Failure,
    FailureStage,
    InFlight,
    Predictions,
    Request,
    Updates,
    sorted_client_ids,
)
from fedlearn.core.serialization import Payload, WireError
from fedlearn.errors import MissingExtra, SettingError, is_count, is_number, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.client_update import codec_rng, update_size_and_dtype
from fedlearn.loop.protocols import Completion, Trainer
from fedlearn.loop.system_model import refuse_early_end
from fedlearn.protocol.requests import RequestHeader, pack_model_body, pack_request, pack_request_body, read_params
from fedlearn.protocol.responses import (
    RESPONSE_OVERHEAD_BYTES,
    InvalidResponse,
    read_evaluations,
    read_updates,
    unpack_response,
)

try:
    from flwr.serverapp import Grid

    from fedlearn.protocol.grid_client import GridClient, ResponseMessage
    from fedlearn.protocol.in_flight import InFlightRequests
    from fedlearn.protocol.membership import FederationError, Membership
except ModuleNotFoundError as error:
    raise MissingExtra("engine=grid", "flower") from error

SETTING_GROUPS = ("scenario", "strategy", "privacy", "compress", "buffers")
Result = TypeVar("Result", Updates, ClientEvaluation)
log = logging.getLogger(__name__)


@engine_builder(deployed=True)
def grid(
    data: FederatedData,
    trainer: Trainer,
    *,
    num_nodes: int | None = None,
    join_timeout: float = 120.0,
    deadline: float = 600.0,
    min_updates: int = 1,
    min_completed: int | None = None,
) -> GridEngine:
    """For ``engine=grid`` on the command line of a simulation, which has no nodes to speak to.

    Args:
        data: not used.
        trainer: not used.
        num_nodes: as `GridEngine` takes it; None: all that may join, counted by the coordinator.
        join_timeout: as `GridEngine` takes it.
        deadline: likewise.
        min_updates: likewise.
        min_completed: likewise.

    Raises:
        SettingError: always; it says how to deploy.
    """
    fix = "python -m fedlearn.deploy.submit ..."
    raise SettingError("_target_", "grid", "serial, vector or ray in a simulation", fix)


class GridEngine(BaseEngine):
    """An engine that trains on the clients of connected nodes.

    Args:
        grid: Flower's way to the nodes.
        settings: ``scenario`` and ``strategy`` as plain settings with their ``_target_``; each node builds its own.
            Optional: ``compress``, the same; ``buffers``, the policy for buffers; ``privacy``, see `set_privacy`.
        run: names the run, the same after a restart of the coordinator: nodes file clients' memories under it.
        num_nodes: how many to wait for at the start, >= 1.
        join_timeout: seconds to wait for them, and later for clients that are needed and not connected.
        deadline: seconds for nodes to answer an order, and to answer an evaluation.
        min_updates: a round with fewer by its deadline stops the run, >= 1.
        min_completed: number of updates that close a round; the other clients of the cohort are spare. None waits for
            all.

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
        self.run, self.num_nodes, self.join_timeout, self.deadline = run, num_nodes, join_timeout, deadline
        self.min_updates, self.min_completed = min_updates, min_completed
        self.grid_client = GridClient(grid)
        self.in_flight = InFlightRequests(self.grid_client, timeout_s=deadline)
        self.membership = Membership(self.grid_client, self._hello)
        self.num_malformed = 0
        super().__init__((), Layout(()))
        self.attempt_id = secrets.token_hex(8)
        self._words = {group: settings[group] for group in SETTING_GROUPS if settings.get(group)}
        self._round = 0

    def open(self) -> None:
        """Wait for the nodes to join; does nothing the second time.

        Raises:
            FederationError: too few came in time, one does not accept the run's words, or they do not fit together.
        """
        if self.clients:
            return
        ends, pause = time.monotonic() + self.join_timeout, 0.05
        while len(self.membership.present) < self.num_nodes:
            self.membership.update(self._round)
            settled = len(self.membership.present) + len(self.membership.refused) >= self.num_nodes
            if (self.membership.refused and settled) or time.monotonic() >= ends:
                few = f"{len(self.membership.present)} of {self.num_nodes} nodes joined within {self.join_timeout:g} s"
                raise FederationError("\n".join([few, *self.membership.report()]))
            time.sleep(pause)
            pause = min(1.3 * pause, 1.0)
        self.layout = self.membership.require_same_model().layout
        self.clients = sorted_client_ids(list(self.membership.members_by_client()))

    def set_privacy(self, settings: Mapping[str, Any], *, rounds: int) -> None:
        """Tell nodes from now on how updates are protected before they leave.

        Args:
            settings: of the mechanism, with its ``_target_`` and the noise multiplier that was found.
            rounds: planned.
        """
        population = {"num_clients": len(self.clients), "rounds": rounds}
        self._words = {**self._words, "privacy": dict(settings), "population": population}

    def initial_parameters(self, seed: int) -> np.ndarray:
        """``params_D`` before the first round, as the node of the lowest client makes them from the seed.

        Raises:
            FederationError: that node does not answer.
        """
        self.open()
        home = self.membership.members_by_client()[self.clients[0]]
        ask = self.build_header("init", home.clients)
        asked = {home.node_id: pack_request(ask, seed=seed)}
        (answer,) = self.grid_client.exchange(asked, round=self._round, timeout_s=self.deadline)
        try:
            return read_params(self.read_payload(answer, ask, self._most_bytes(1, 0)), self.layout)
        except InvalidResponse as error:
            raise FederationError(f"{home} gives no initial parameters: {error}") from error

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort; one result for each client, in ascending order, or their sum where updates are masked.

        Raises:
            FederationError: fewer than ``min_updates`` clients delivered by the deadline.
            SettingError: a round that closes early would break the sampling law of a privacy claim.
        """
        refuse_early_end(strategy, self.min_completed, "engine.min_completed")
        self.open()
        self._round = request.round
        self._muster(cohort)
        if any(stage.needs_sum for stage in strategy.stages):
            yield from self._fit_masked(request, strategy, cohort)
            return
        read, num_extra = self._reading(strategy, request)
        failures: list[Failure] = []
        arriving = self._results(
            "fit",
            cohort,
            self._asking,
            pack_request_body(request),
            read,
            num_extra=num_extra,
            enough=self.min_completed,
        )
        delivered = 0
        for result in _ascending(cohort, arriving):
            if isinstance(result, Updates):
                delivered += 1
                self._accepted(request, [_client(result)])
            elif result.stage.counts_as_failure:
                failures.append(result)
            yield result
        self._refuse_too_few(request, cohort, delivered, failures)

    def wait_for_next(self, strategy: Strategy, in_flight: Sequence[InFlight], clock: float) -> Completion:
        """Send out those of these orders that are new, and wait for the next client's answer; by the wall's clock.

        Raises:
            SettingError: rounds are to close early, but there are none.
        """
        expected = "null: an asynchronous strategy has strategy.buffer_size"
        require(
            self.min_completed is None,
            "engine.min_completed",
            self.min_completed,
            expected,
            "engine.min_completed=null",
        )
        began = time.monotonic()
        self.open()
        places = {(one.client, one.request.round): place for place, one in enumerate(in_flight)}
        self.in_flight.cancel_except(places)
        for name, place in places.items():
            if name not in self.in_flight and not self._sent_out(in_flight[place]):
                lost = Failure(client=name[0], stage=FailureStage.NODE, reason="no node with this client is connected")
                return Completion(place, lost, clock + time.monotonic() - began)
        name, ask, answer = self.in_flight.wait_for_next()
        one = in_flight[places[name]]
        left_out = Failure(
            client=one.client, stage=FailureStage.RESPONSE, reason="the answer of its node leaves it out"
        )
        result = next(iter(self._read(answer, ask, *self._reading(strategy, one.request))), left_out)
        if isinstance(result, Updates):
            self._accepted(one.request, [one.client])
        return Completion(places[name], result, clock + time.monotonic() - began)

    def _sent_out(self, one: InFlight) -> bool:
        """Whether an order is out, or waits for its node to be done with another; False: nobody takes it."""
        if one.client not in self.membership.members_by_client() or one.request.round != self._round:
            self._round = one.request.round
            self.membership.update(self._round)
            self.clients = sorted_client_ids(list({*self.clients, *self.membership.members_by_client()}))
        home = self.membership.members_by_client().get(one.client)
        if home is None:
            return False
        if self.in_flight.is_busy(home.node_id):
            return True
        ask = self.build_header("fit", [one.client])
        return self.in_flight.send(
            (one.client, ask.round), ask, home.node_id, self._asking(ask), pack_request_body(one.request)
        )

    def _reading(
        self, strategy: Strategy, order: Request
    ) -> tuple[Callable[[Payload, RequestHeader], list[Updates | Failure]], int]:
        """How answers to an order are read, and how many vectors there are besides each update."""
        sizes = dict.fromkeys(extra_names(strategy.local), self.layout.num_parameters)
        sizes["delta"], _ = update_size_and_dtype(strategy, order, self.layout)
        withheld = strategy.privacy_guarantee is not None and "examples" in strategy.privacy_guarantee.withheld
        codec, sent = strategy.codec, strategy.shared_layout(self.layout)

        def decode(payload: bytes, client: ClientId) -> np.ndarray:
            assert codec is not None
            return codec.decode(payload, sent, codec_rng(order, client))

        def read(parcel: Payload, ask: RequestHeader) -> list[Updates | Failure]:
            found = read_updates(parcel, ask, sizes, decode=decode if codec else None)
            results = [_with_losses(one, strategy) for one in found]
            return results if withheld else [self._as_told(one) for one in results]

        return read, len(sizes) - 1

    def _fit_masked(
        self, order: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[PartialAggregate | Failure]:
        from fedlearn.engines.secure_round import run_secure_round

        results = list(run_secure_round(self, order, strategy, cohort))
        yield from results
        summed = [client for one in results if isinstance(one, PartialAggregate) for client in one.clients]
        self._accepted(order, summed)
        failures = [one for one in results if isinstance(one, Failure)]
        self._refuse_too_few(order, cohort, len(summed), failures)

    def state_rounds(self, clients: Iterable[ClientId]) -> list[int]:
        """The round from whose memory each client goes on; 0 for those that start."""
        return [int(self.client_states[client]["round"]) if client in self.client_states else 0 for client in clients]

    def _accepted(self, order: Request, clients: Iterable[ClientId]) -> None:
        self.client_states |= {client: {"round": np.array(order.round, np.int64)} for client in clients}

    def _refuse_too_few(
        self, order: Request, cohort: Sequence[ClientId], delivered: int, failures: Sequence[Failure]
    ) -> None:
        if delivered < min(self.min_updates, len(cohort)):  # a Poisson cohort may be empty
            why = "; ".join(f"client {one.client}, at stage {one.stage}: {one.reason}" for one in failures[:5])
            few = f"round {order.round} has {delivered} updates, fewer than engine.min_updates={self.min_updates}"
            raise FederationError(f"{few} ({why})")

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[ClientEvaluation | Failure]:
        """What each client tells of the model, or of its own, on its held-out part; outputs and targets stay there."""
        like, asking = self._like(), self._asking if personal_strategy else pack_request

        def read(parcel: Payload, ask: RequestHeader) -> list[ClientEvaluation | Failure]:
            return read_evaluations(parcel, ask, like)

        for result in _ascending(cohort, self._results("evaluate", cohort, asking, pack_model_body(params_D), read)):
            yield replace(result, stage=FailureStage.EVALUATE) if isinstance(result, Failure) else result

    def _asking(self, ask: RequestHeader) -> bytes:
        """A request that says which of its memories each client goes on from."""
        return pack_request(ask, since=self.state_rounds(ask.clients))

    def describe(self, cohort_size: int) -> str:
        """How many nodes there are, and how long they have."""
        kinds = Counter(member.framework for member in self.membership.present.values())
        how = ", ".join(f"{count} with {framework}" for framework, count in sorted(kinds.items()))
        return f"{len(self.membership.present)} nodes ({how}), {self.deadline:g} s to answer"

    def close(self) -> None:
        """Note what was ignored; connections are Flower's to close."""
        if self.grid_client.num_ignored or self.num_malformed:
            causes = {**self.grid_client.num_ignored, "malformed": self.num_malformed}
            told = ", ".join(f"{count} {cause}" for cause, count in causes.items())
            log.warning("answers that were ignored: %s", told)

    def _results(
        self,
        kind: str,
        cohort: Sequence[ClientId],
        asking: Callable[[RequestHeader], bytes],
        body: bytes,
        read: Callable[[Payload, RequestHeader], list[Any]],
        *,
        num_extra: int = 0,
        enough: int | None = None,
    ) -> Iterator[Any]:
        """Results as they arrive, and a failure for every client of the cohort that has none."""
        homes = self.membership.members_by_client()
        missing = dict.fromkeys(cohort, (FailureStage.NODE, "no node with this client is connected"))
        wanted: dict[int, list[ClientId]] = {}
        for client in missing.keys() & homes.keys():
            wanted.setdefault(homes[client].node_id, []).append(client)
        asks = {node: self.build_header(kind, clients) for node, clients in wanted.items()}
        requests = {node: asking(ask) for node, ask in asks.items()}
        left = enough if enough is not None else len(cohort) + 1
        exchange = self.grid_client.exchange(requests, body, round=self._round, timeout_s=self.deadline)
        for answer in exchange:
            ask = asks[answer.node_id]
            for result in self._read(answer, ask, read, num_extra):
                missing.pop(_client(result), None)
                left -= isinstance(result, Updates)
                yield result
            for client in missing.keys() & set(ask.clients):
                missing[client] = (FailureStage.RESPONSE, "the answer of its node leaves it out")
                if kind == "evaluate":  # it has too few examples to tell of
                    del missing[client]
            if left <= 0:
                exchange.close()
                missing = dict.fromkeys(
                    missing, (FailureStage.NOT_NEEDED, f"the round had its {enough} updates without it")
                )
                break
        yield from (Failure(client=client, stage=stage, reason=reason) for client, (stage, reason) in missing.items())

    def _read(
        self,
        answer: ResponseMessage,
        ask: RequestHeader,
        read: Callable[[Payload, RequestHeader], list[Any]],
        num_extra: int,
    ) -> list[Any]:
        try:
            found = read(self.read_payload(answer, ask, self._most_bytes(len(ask.clients), num_extra)), ask)
        except InvalidResponse as error:
            log.warning("%s: %s", ask.kind, error)
            if (
                error.stage == FailureStage.REQUEST
            ):  # the node is not the one that said hello: started again, with other settings
                self.membership.request_hello(answer.node_id)
            return [Failure(client=client, stage=error.stage, reason=str(error)) for client in ask.clients]
        except WireError as error:
            self.num_malformed += 1
            log.warning("ignored an answer of node %d: %s", answer.node_id, error)
            return [Failure(client=client, stage=FailureStage.RESPONSE, reason=str(error)) for client in ask.clients]
        return found

    def read_payload(self, response: ResponseMessage, header: RequestHeader, max_bytes: int) -> Payload:
        """What a node answers.

        Raises:
            NoAnswer: it does not, or says why it cannot.
            WireError: it answers something else, or too much.
        """
        if response.payload is None:
            raise InvalidResponse(FailureStage.NODE, response.reason)
        if len(response.payload) > max_bytes:
            raise WireError(f"the answer has {len(response.payload)} bytes, expected at most {max_bytes}")
        found = unpack_response(header, response.payload)
        if not isinstance(found, Payload):
            raise InvalidResponse(*found)
        return found

    def _most_bytes(self, num_clients: int, num_extra: int) -> int:
        return RESPONSE_OVERHEAD_BYTES + 4 * self.layout.num_parameters * num_clients * (1 + num_extra)

    def _as_told(self, result: Updates | Failure) -> Updates | Failure:
        """Refuse an update whose weight is not what its node said when it joined."""
        if isinstance(result, Failure):
            return result
        client, count = _client(result), int(result.num_examples_K[0])
        told = (
            self.membership.members_by_client()[client].num_examples[client]
            if client in self.membership.members_by_client()
            else count
        )
        if count == told:
            return result
        reason = f"the update claims {count} training examples; the node told {told} when it joined"
        return Failure(client=client, stage=FailureStage.UPDATE, reason=reason)

    def _muster(self, cohort: Sequence[ClientId]) -> None:
        """Call the roll; wait, for so long, while too few of the cohort are connected."""
        ends = time.monotonic() + self.join_timeout
        self.membership.update(self._round)
        while len(self.membership.members_by_client().keys() & set(cohort)) < min(self.min_updates, len(cohort)):
            if time.monotonic() >= ends:
                break  # the round fails by name
            time.sleep(0.25)
            self.membership.update(self._round)
        self.clients = sorted_client_ids(list({*self.clients, *self.membership.members_by_client()}))

    def build_header(self, kind: str, clients: Iterable[ClientId]) -> RequestHeader:
        """A request about these clients, in this round."""
        return RequestHeader(
            kind=kind,
            run=self.run,
            round=self._round,
            id=secrets.token_hex(16),
            settings=self._words,
            clients=sorted_client_ids(list(clients)),
            layout=self.layout.digest if self.layout.leaves else "",
        )

    def _hello(self) -> tuple[RequestHeader, bytes]:
        ask = self.build_header("hello", ())
        return ask, pack_request(ask)

    def _like(self) -> ClientEvaluation:
        """A tally of this task."""
        model = self.membership.require_same_model()
        num_outputs = model.num_classes if model.task == "multiclass" else 1
        part = Predictions(client=0, outputs=np.zeros((1, num_outputs)), targets=np.zeros(1, np.int64))
        return evaluate_client(part, task=model.task, num_classes=model.num_classes)


def _with_losses(result: Updates | Failure, strategy: Strategy) -> Updates | Failure:
    """Refuse an update without the losses that the strategy's aggregator is to weigh it by."""
    if isinstance(result, Failure):
        return result
    losses = {name: result.metrics.get(f"loss/{name}") for name in strategy.local.evaluate_models}
    missing = [name for name, loss in losses.items() if loss is None or not np.isfinite(loss.client_means()).all()]
    reason = f"the reply does not tell the loss of {', '.join(missing)}"
    return Failure(client=_client(result), stage=FailureStage.UPDATE, reason=reason) if missing else result


def _client(result: Updates | ClientEvaluation | Failure) -> ClientId:
    return int(result.clients_K[0]) if isinstance(result, Updates) else result.client


def _ascending(cohort: Sequence[ClientId], arriving: Iterable[Any]) -> Iterator[Any]:
    """Results in order of clients, each as soon as all before it are there."""
    held: dict[ClientId, Any] = {}
    queue = deque(sorted(cohort))
    for result in arriving:
        held[_client(result)] = result
        while queue and queue[0] in held:
            yield held.pop(queue.popleft())
    yield from (held[client] for client in queue if client in held)
