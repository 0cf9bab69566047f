"""Who is in a federation: the nodes that have said which clients live with them and which model they train."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from fedlearn.core.federated_data import Task
from fedlearn.core.layout import Layout, Leaf
from fedlearn.core.metrics import METRICS
from fedlearn.core.records import ClientId
from fedlearn.core.serialization import Payload, WireError, read_fields
from fedlearn.errors import FedlearnError
from fedlearn.protocol.grid_client import GridClient, ResponseMessage
from fedlearn.protocol.requests import RequestHeader, layout_from_json
from fedlearn.protocol.responses import unpack_response

RETRY_INTERVAL_S = 30.0  # seconds after which a node that was refused is asked once more
HELLO_TIMEOUT_S = 600.0  # for a node to import its framework and read its data
log = logging.getLogger(__name__)


class FederationError(FedlearnError):
    """The nodes that are needed did not come, or do not fit together."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A node that has said hello.

    Attributes:
        node_id: Flower's id of it.
        layout: of its model.
        num_examples: training examples of each of its clients, as told.
        names: of its clients.
        name, task, num_classes, model, partition: of its scenario.
        framework, device: of its trainer.
        supports_metrics: whether its policy lets evaluation metrics leave.
        masking_key: its public key for secure aggregation, in hexadecimal; empty if it has none.
    """

    node_id: int
    layout: Layout
    num_examples: Mapping[ClientId, int]
    names: Mapping[ClientId, str]
    name: str
    task: Task
    num_classes: int
    model: str
    partition: str
    framework: str
    device: str
    supports_metrics: bool
    masking_key: str

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """Who lives there, ascending."""
        return tuple(sorted(self.num_examples))

    def __str__(self) -> str:
        return f"the node of client{'s' * (len(self.clients) > 1)} {', '.join(map(str, self.clients))}"


class Membership:
    """Keeps the roll of nodes.

    Args:
        grid_client: how to reach them.
        make_hello: makes the bytes of a hello, and what it asks.

    Attributes:
        present: nodes that are connected and fit in, by Flower's id.
        refused: why others were not let in, by Flower's id.
    """

    def __init__(self, grid_client: GridClient, make_hello: Callable[[], tuple[RequestHeader, bytes]]) -> None:
        self.grid_client, self.make_hello = grid_client, make_hello
        self.present: dict[int, Member] = {}
        self.refused: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        self._asks: dict[int, RequestHeader] = {}
        self._when: dict[int, float] = {}
        self._model: Member | None = None

    def update(self, round: int) -> None:
        """Ask whoever is new, take in whoever has answered, and strike off who has gone; returns at once."""
        connected = self.grid_client.node_ids()
        for node in [node for node in self.present if node not in connected]:
            log.warning("%s has gone", self.present.pop(node))
        self._asked = {message: node for message, node in self._asked.items() if node in connected}
        again = time.monotonic() - RETRY_INTERVAL_S
        new = connected - self.present.keys() - set(self._asked.values())
        requests = {}
        for node in sorted(node for node in new if self._when.get(node, again) <= again):
            self._asks[node], requests[node] = self.make_hello()
        self._asked |= self.grid_client.send(requests, round=round, timeout_s=HELLO_TIMEOUT_S)
        for answer in self.grid_client.poll(self._asked):
            self._take_in(answer)

    def require_same_model(self) -> Member:
        """Hold all who are present to one model; it is what later comers must have too.

        Raises:
            FederationError: they do not agree; the odd one out is named.
        """
        if self._model is None:
            members = sorted(self.present.values(), key=lambda one: one.clients)
            counts = Counter(_problem(one) for one in members)
            self._model = next(one for one in members if _problem(one) == counts.most_common(1)[0][0])
            for one in members:
                if _problem(one) != _problem(self._model):
                    raise FederationError(f"{one} does not fit {self._model}: {_difference(one, self._model)}")
        return self._model

    def members_by_client(self) -> dict[ClientId, Member]:
        """Where each client lives."""
        return {client: member for member in self.present.values() for client in member.clients}

    def request_hello(self, node_id: int) -> None:
        """Have a node say hello anew, at the next call of the roll."""
        self.present.pop(node_id, None)

    def report(self) -> list[str]:
        """Who has joined, who was refused and why, and who has not answered: a line each."""
        lines = [f"  joined    {member}" for member in self.present.values()]
        lines += [f"  refused   node {node}: {reason}" for node, reason in sorted(self.refused.items())]
        silent = sorted(self._asked.values())
        return lines + [f"  silent    node {node} is connected, its trainer has not answered" for node in silent]

    def _take_in(self, answer: ResponseMessage) -> None:
        try:
            member = _member(answer, self._asks.pop(answer.node_id))
            self._refuse_claims(member)
            if self._model is not None and _problem(member) != _problem(self._model):
                raise WireError(f"{member} does not fit {self._model}: {_difference(member, self._model)}")
        except WireError as error:
            self.refused[answer.node_id] = str(error)
            self._when[answer.node_id] = time.monotonic()
            log.warning("node %d is not let in: %s", answer.node_id, error)
            return
        self.refused.pop(answer.node_id, None)
        self.present[answer.node_id] = member
        quiet = "" if member.supports_metrics else ", tells no metrics"
        log.info("%s has joined (%s on %s%s)", member, member.framework, member.device, quiet)

    def _refuse_claims(self, member: Member) -> None:
        homes = self.members_by_client()
        taken = [client for client in member.clients if client in homes]
        if taken:
            other = homes[taken[0]].node_id
            both = f"nodes {other} and {member.node_id} both claim client {taken[0]}"
            raise WireError(f"{both}; give each client to one node")


def _member(answer: ResponseMessage, ask: RequestHeader) -> Member:
    if answer.payload is None:
        raise WireError(answer.reason)
    found = unpack_response(ask, answer.payload)
    if not isinstance(found, Payload):
        stage, reason = found
        raise WireError(f"it refuses ({stage}): {reason}")
    words = dict.fromkeys(("name", "task", "model", "partition", "framework", "device", "masking_key"), str)
    numbers = {"num_classes": int, "supports_metrics": bool}
    given = read_fields(found.metadata, clients=list, leaves=list, num_examples=list, names=dict, **numbers, **words)
    clients, counts = given.pop("clients"), given.pop("num_examples")
    whole = all(type(number) is int and number >= 0 for number in [*clients, *counts])
    if not clients or not whole or len(counts) != len(clients) or len(set(clients)) != len(clients):
        raise WireError(f"it speaks for clients {clients} with {counts} examples")
    if given["task"] not in METRICS:
        raise WireError(f"its task is {given['task']}, expected one of {', '.join(METRICS)}")
    names = given.pop("names")
    return Member(
        node_id=answer.node_id,
        layout=layout_from_json(given.pop("leaves")),
        num_examples=dict(zip(clients, counts, strict=True)),
        names={client: str(names.get(str(client), client))[:100] for client in clients},
        **given,
    )


def _problem(member: Member) -> tuple[str, str, int, str]:
    return member.name, member.task, member.num_classes, member.layout.digest


def _difference(one: Member, other: Member) -> str:
    """The first thing in which two members' models differ."""
    for mine, theirs in zip_longest(one.layout.leaves, other.layout.leaves):
        if mine != theirs:
            return f"its model has {_in_words(mine)} where the other has {_in_words(theirs)}"
    return f"it speaks of {one.name} ({one.task}, {one.num_classes}), the other of {other.name} ({other.task})"


def _in_words(leaf: Leaf | None) -> str:
    return f"{leaf.name} {'x'.join(map(str, leaf.shape))}" if leaf else "nothing"
