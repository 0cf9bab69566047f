"""Exchange requests and responses with the nodes of a federation.

`Exchange` divides a request to a cohort among the nodes, sends it, and reads the responses as they arrive. Each client
of the cohort gets a result, or a `Failure` with a named cause. Every wait ends at a deadline.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, Failure, FailureStage, sorted_client_ids
from fedlearn.core.serialization import Payload, WireError
from fedlearn.core.tasks import Task, as_task
from fedlearn.protocol.cohort_request import CohortRequest, Result
from fedlearn.protocol.fields import client_of
from fedlearn.protocol.grid_client import GridClient, InFlightRequest
from fedlearn.protocol.membership import FederationError, Member, Membership
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.responses import ParameterReader, ResponseReader
from fedlearn.protocol.sites import RunSites, StartState

HELLO_TIMEOUT_S = 600.0  # seconds for a node to import its framework and to read its data
MAX_HELLO_BYTES = 8 * 2**20  # bytes of a response to a hello request
REPORT_INTERVAL_S = 5.0  # seconds between two lines about missing sites
RequestKey = tuple[ClientId, int]  # client and round of a request of an asynchronous strategy
log = logging.getLogger(__name__)


class Exchange:
    """Send requests to the members of a federation and read their responses.

    Args:
        grid_client: connection to the nodes.
        settings: settings from which nodes build scenario and strategy.
        run: name of the run.
        timeout_s: seconds after which a request counts as failed, > 0.
        check_member: function that raises `WireError` for a node that may not have its clients.
        find_task: see `Membership`.
        sites: sites of the run; no other node gets a request. Default: all sites.

    Attributes:
        membership: nodes that have joined.
        layout: layout of the model; empty until the nodes have joined.
        origin: person and folder of the run, for the audit logs of the nodes.
    """

    def __init__(
        self,
        grid_client: GridClient,
        settings: Mapping[str, Any],
        *,
        run: str,
        timeout_s: float,
        check_member: Callable[[Member], None] = lambda member: None,
        find_task: Callable[[str], Task] = as_task,
        sites: RunSites | None = None,
    ) -> None:
        self.grid_client, self.settings, self.run, self.timeout_s = grid_client, settings, run, timeout_s
        self.sites = sites or RunSites()
        self.membership = Membership(check_member, find_task, self.sites)
        self.layout = Layout(())
        self.origin: Mapping[str, str] = {}
        self._hellos: dict[str, int] = {}  # id of the request -> node
        self._in_flight: dict[RequestKey, tuple[NodeRequest, CohortRequest[Any]]] = {}

    def wait_for_sites(self, *, timeout_s: float) -> None:
        """Wait until enough sites of the run have joined with the same model, and report the missing sites.

        Raises:
            FederationError: Fewer than ``sites.min_sites`` sites joined in time, or too many sites refuse.
        """
        start = reported = time.monotonic()
        enough_since, pause = math.inf, 0.05
        while True:
            self.update_members(0)
            state = self._start_state(time.monotonic() - start, time.monotonic() - enough_since)
            enough_since = min(enough_since, time.monotonic()) if state.has_enough else math.inf
            if state.is_ready or state.is_hopeless or state.waited_s >= timeout_s:
                break
            if time.monotonic() - reported >= REPORT_INTERVAL_S:
                reported = time.monotonic()
                self.sites.report(f"waiting    {state.describe()}")
            time.sleep(pause)
            pause = min(1.3 * pause, 1.0)
        if self.membership.present:
            self.membership.fix_model()
        if len(self.membership.present) < self.sites.min_sites:
            few = f"{self._start_state(0.0, 0.0).describe()} (after {state.waited_s:.0f} s)"
            need = f"  expected  at least {self.sites.min_sites} of these sites (min_sites)"
            raise FederationError("\n".join([few, need, *self.membership.report()]))
        if missing := self.membership.report()[len(self.membership.present) :]:
            self.sites.report("\n".join([f"sites      {self._start_state(0.0, 0.0).describe()}", *missing]))
        self.layout = self.membership.model.layout

    def _start_state(self, waited_s: float, settled_s: float) -> StartState:
        def names(nodes: Iterable[int]) -> list[str]:
            return [site for node in nodes if (site := self.sites.site_of(node)) is not None]

        members = self.membership
        return StartState(
            sites=self.sites,
            connected=names({*members.present, *members.refused, *members.postponed, *members.pending}),
            joined=names(members.present),
            refused=names(members.refused),
            waited_s=waited_s,
            settled_s=settled_s,
        )

    def wait_for_clients(self, cohort: Collection[ClientId], needed: int, *, round: int, timeout_s: float) -> None:
        """Wait until enough clients of a cohort are connected, or until the deadline.

        Args:
            cohort: ids of the clients.
            needed: number of clients to wait for, >= 0.
            round: round of the hello requests to new nodes.
            timeout_s: seconds to wait.
        """
        deadline = time.monotonic() + timeout_s
        self.update_members(round)
        while len(self.membership.members_by_client().keys() & set(cohort)) < needed and time.monotonic() < deadline:
            time.sleep(0.25)
            self.update_members(round)

    def wait_for_expected(
        self, cohort: Collection[ClientId], needed: int | None, *, round: int, timeout_s: float
    ) -> None:
        """Wait for the clients of a cohort that took part before, also if their nodes are disconnected at this moment.

        A client whose node does not return in time is no longer expected, until its node joins again.

        Args:
            cohort: ids of the clients.
            needed: number of clients that suffice; None: all of them.
            round: round of the hello requests to new nodes.
            timeout_s: seconds to wait.
        """
        expected = self.membership.expected & set(cohort)
        self.update_members(round)
        ends, said = time.monotonic() + timeout_s, time.monotonic()
        while missing := expected - self.membership.members_by_client().keys():
            now = time.monotonic()
            if now >= ends or (needed is not None and len(expected) - len(missing) >= needed):
                break
            if now - said >= REPORT_INTERVAL_S:
                said = now
                self._report_missing(missing, round, ends - now)
            time.sleep(0.5)
            self.update_members(round)
        self.membership.expected -= missing

    def update_members(self, round: int) -> None:
        """Send hello requests to new nodes, read available responses, and remove disconnected nodes; do not wait."""
        members = self.membership
        connected = {node_id for node_id in self.grid_client.node_ids() if self.sites.includes(node_id)}
        members.remove_except(connected)
        disconnected = {id for id, node_id in self._hellos.items() if node_id not in connected}
        self.grid_client.cancel(disconnected)
        self._hellos = {id: node_id for id, node_id in self._hellos.items() if id not in disconnected}
        hello = partial(self._request, RequestKind.HELLO, round, content=Payload(metadata=dict(self.origin)))
        requests = {node_id: hello() for node_id in members.nodes_to_greet(connected)}
        self._send(requests, timeout_s=HELLO_TIMEOUT_S, max_bytes=lambda clients: MAX_HELLO_BYTES)
        self._hellos |= {request.id: node_id for node_id, request in requests.items()}
        members.pending |= requests.keys()
        for response in self.grid_client.take(self._hellos.keys()):
            self._admit(response, self._hellos.pop(response.id))

    def initial_parameters(self, client: ClientId, seed: int, round: int) -> Any:
        """Return ``params_D`` that the node of a client draws from a seed.

        Raises:
            FederationError: The node fails or refuses.
        """
        content = Payload(metadata={"seed": seed})
        reader = ParameterReader(num_parameters=self.layout.num_parameters)
        member = self.membership.members_by_client()[client]
        request = self._request(RequestKind.INIT, round, clients=member.clients, content=content)
        self._send({member.node_id: request}, max_bytes=reader.max_bytes)
        response = self.grid_client.wait({request.id})
        if response.refusal:
            raise FederationError(f"{member} sends no initial parameters: {response.refusal.reason}")
        try:
            return reader.read(response.content, ())[0]
        except WireError as error:
            raise FederationError(f"{member} sends no initial parameters: {error}") from error

    def run_cohort(self, cohort: CohortRequest[Result]) -> Iterator[Result | Failure]:
        """Send a request to a cohort and yield one result per client, in ascending order of clients.

        The method yields a result as soon as the results of all clients with lower ids are available.
        """
        arrived: dict[ClientId, Result | Failure] = {}
        queue = deque(sorted(cohort.clients))
        for result in self._results(cohort):
            arrived[client_of(result)] = result
            while queue and queue[0] in arrived:
                yield arrived.pop(queue.popleft())
        yield from (arrived[client] for client in queue if client in arrived)

    def start(self, key: RequestKey, cohort: CohortRequest[Any]) -> None:
        """Send a request to one client. Its node must be connected and not busy."""
        ((node_id, request),) = self._divide(cohort).items()
        self._send({node_id: request}, max_bytes=cohort.reader.max_bytes)
        self._in_flight[key] = (request, cohort)

    def is_in_flight(self, key: RequestKey) -> bool:
        """Return whether a request was sent and `wait_for_next` did not return its result."""
        return key in self._in_flight

    def cancel_except(self, keys: Collection[RequestKey]) -> None:
        """Cancel all in-flight requests except these."""
        cancelled = [key for key in self._in_flight if key not in keys]
        self.grid_client.cancel({self._in_flight.pop(key)[0].id for key in cancelled})

    def wait_for_next(self) -> tuple[RequestKey, Any]:
        """Wait for the completion of an in-flight request. Return its key and the result of its client.

        Raises:
            RuntimeError: No request is in flight.
        """
        keys = {request.id: key for key, (request, _) in self._in_flight.items()}
        response = self.grid_client.wait(keys.keys())
        request, cohort = self._in_flight.pop(keys[response.id])
        (result,) = self._read(request, response, cohort.reader)
        return keys[response.id], result

    def _results(self, cohort: CohortRequest[Result]) -> Iterator[Result | Failure]:
        """Yield results as they arrive, then a failure for every client without one."""
        requests = self._divide(cohort)
        delivered = {client for request in requests.values() for client in request.clients}
        waiting = {request.id: request for request in requests.values()}
        missing, num_completed, needed = set(cohort.clients), 0, cohort.min_completed
        stage, closed = FailureStage.NODE, ""
        self._send(requests, max_bytes=cohort.reader.max_bytes)
        try:
            while waiting:
                response = self.grid_client.wait(waiting.keys())
                request = waiting.pop(response.id)
                missing -= set(request.clients)
                for result in self._read(request, response, cohort.reader):
                    num_completed += not isinstance(result, Failure)
                    yield result
                if needed is not None and num_completed >= needed:
                    stage, closed = FailureStage.NOT_NEEDED, f"the round closed with {needed} other updates"
                    break
        finally:
            self.grid_client.cancel(waiting.keys())
        for client in missing:
            reason = closed or self.membership.absence_of(client)
            yield Failure(client=client, stage=stage, reason=reason, is_delivered=client in delivered)

    def _read(
        self, request: NodeRequest, response: NodeResponse, reader: ResponseReader[Result]
    ) -> list[Result | Failure]:
        """Return the results of the clients of one request, and a failure for each client without a result."""
        site = self.membership.site_of(request.clients)
        if response.refusal:
            log.warning("%s, %s: %s", site, request.kind, response.refusal.reason)
            if response.refusal.stage == FailureStage.REQUEST:  # the node restarted, with other clients or settings
                self.membership.forget_clients(request.clients)
            return _failures(request.clients, response.refusal.stage, f"{site}: {response.refusal.reason}")
        try:
            named = [replace(failure, reason=f"{site}: {failure.reason}") for failure in response.failures]
            results: list[Result | Failure] = [*named, *reader.read(response.content, response.clients)]
        except WireError as error:
            self.grid_client.num_ignored["malformed"] += 1
            log.warning("ignored a response of %s to %s: %s", site, request.kind, error)
            return _failures(request.clients, FailureStage.RESPONSE, f"{site}: {error}")
        omitted = set() if reader.may_omit_clients else set(request.clients) - {client_of(result) for result in results}
        return results + _failures(omitted, FailureStage.RESPONSE, f"the response of {site} leaves the client out")

    def _report_missing(self, clients: Collection[ClientId], round: int, remaining_s: float) -> None:
        sites = sorted({self.membership.site_of([client]) for client in clients})
        text = f"round {round} waits for {', '.join(sites)}, at most {remaining_s:.0f} s"
        log.warning(text)
        self.sites.report(f"waiting    {text}")

    def _divide(self, cohort: CohortRequest[Any]) -> dict[int, NodeRequest]:
        """Return a request for each node that has clients of the cohort."""
        members, clients_by_node = self.membership.members_by_client(), dict[int, list[ClientId]]()
        for client in cohort.clients:
            if client in members:
                clients_by_node.setdefault(members[client].node_id, []).append(client)
        rounds, requests = cohort.state_rounds, {}
        for node_id, clients in clients_by_node.items():
            requests[node_id] = self._request(
                cohort.kind,
                cohort.round,
                clients=(ascending := sorted_client_ids(clients)),
                state_rounds=None if rounds is None else tuple(rounds[client] for client in ascending),
                content=cohort.content_for(ascending),
                shared=cohort.shared,
            )
        return requests

    def _request(self, kind: RequestKind, round: int, **fields: Any) -> NodeRequest:
        layout = self.layout.digest if self.layout.leaves and kind != RequestKind.HELLO else ""
        id = secrets.token_hex(16)
        return NodeRequest(kind=kind, run=self.run, round=round, id=id, settings=self.settings, layout=layout, **fields)

    def _send(
        self,
        requests: Mapping[int, NodeRequest],
        *,
        max_bytes: Callable[[int], int],
        timeout_s: float | None = None,
    ) -> None:
        """Send requests to nodes. ``max_bytes`` returns the size limit of a response for a number of clients."""
        self.grid_client.send(
            [
                InFlightRequest(
                    node_id=node_id,
                    request=request,
                    timeout_s=timeout_s or self.timeout_s,
                    max_response_bytes=max_bytes(len(request.clients)),
                )
                for node_id, request in requests.items()
            ]
        )

    def _admit(self, response: NodeResponse, node_id: int) -> None:
        """Add a node to the members from its response to a hello request, or refuse the node."""
        self.membership.pending.discard(node_id)
        if response.refusal and response.refusal.is_transient:
            return self.membership.postpone(node_id, response.refusal.reason)
        try:
            if response.refusal:
                raise WireError(f"stage {response.refusal.stage}: {response.refusal.reason}")
            site = self.sites.site_of(node_id) or ""
            self.membership.admit(Member.read(response.content, response.clients, node_id, site))
        except WireError as error:
            self.membership.refuse(node_id, str(error))


def _failures(clients: Iterable[ClientId], stage: FailureStage, reason: str) -> list[Any]:
    return [Failure(client=client, stage=stage, reason=reason) for client in sorted(clients)]
