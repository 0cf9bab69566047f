"""Keep the members of a federation, the nodes that have described their clients and their model.

This module packs and reads the description of a node, and admits or refuses nodes. `fedlearn.protocol.exchange` sends
the messages.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from fedlearn.core.layout import Layout, Leaf
from fedlearn.core.records import ClientId
from fedlearn.core.serialization import Payload, WireError, read_fields, read_text
from fedlearn.core.tasks import Task, as_task
from fedlearn.core.tasks.base import TASK_NAME
from fedlearn.core.version import VERSION
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.protocol.fields import read_number, read_numbers
from fedlearn.protocol.sites import STRANGER, RunSites

RETRY_INTERVAL_S = 30.0  # seconds until a refused node gets a new hello request
POSTPONE_INTERVAL_S = 2.0  # seconds until a node with a transient problem gets a new hello request
MAX_PARAMETERS = 2**31  # a request has at most 8 GiB, which is this number of float32 parameters
MAX_CLASSES = 2**14  # a confusion matrix of the coordinator then has at most 2 GiB
NOT_CONNECTED = "no node with this client is connected"
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")
log = logging.getLogger(__name__)


class FederationError(FedlearnError):
    """Report a federation with too few sites, or a node that has failed."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """The description of a node in its response to a hello request.

    Attributes:
        layout: layout of its model.
        num_examples: client -> number of training examples, as the node reports it.
        names: client -> name.
        name, num_classes, model, partition: properties of its scenario.
        task: name of the task. It is text of another party, so it is never imported by this name alone.
        framework, device: properties of its trainer.
        version: version of fedlearn at the node.
        supports_metrics: True if its policy allows evaluation metrics to leave.
        base_digest: SHA-256 of the files of its pretrained model, in hexadecimal; empty without one.
        masking_key: public key for secure aggregation, in hexadecimal; empty if the node has none.
        node_id: Flower's id of the node; 0 at the node itself, which does not know its id.
        site: name of its site at the coordinator; empty at the node itself.
    """

    layout: Layout
    num_examples: Mapping[ClientId, int]
    names: Mapping[ClientId, str]
    name: str
    task: str
    num_classes: int
    model: str
    partition: str
    framework: str
    device: str
    supports_metrics: bool
    masking_key: str
    base_digest: str = ""
    version: str = VERSION
    node_id: int = 0
    site: str = ""

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """Clients of the node, ascending."""
        return tuple(sorted(self.num_examples))

    def __str__(self) -> str:
        clients = f"client{'s' * (len(self.clients) > 1)} {', '.join(map(str, self.clients))}"
        return f"site {self.site} ({clients})" if self.site else f"the node of {clients}"

    def pack(self) -> Payload:
        """Return the description as the content of a response to a hello request."""
        names = ("name", "task", "num_classes", "model", "partition", "framework", "device", "supports_metrics")
        keys = ("masking_key", "base_digest", "version")
        metadata: dict[str, Any] = {name: getattr(self, name) for name in (*names, *keys)}
        metadata["leaves"] = [list(asdict(leaf).values()) for leaf in self.layout.leaves]
        metadata["num_examples"] = [self.num_examples[client] for client in self.clients]
        metadata["names"] = [self.names[client] for client in self.clients]
        return Payload(metadata=metadata)

    @classmethod
    def read(cls, content: Payload, clients: Sequence[ClientId], node_id: int, site: str = "") -> Member:
        """Return the member that an untrusted content describes.

        Raises:
            WireError: A field is missing or has a wrong type or value.
        """
        texts = ("name", "task", "model", "partition", "framework", "device", "masking_key", "base_digest")
        lists = dict.fromkeys(("leaves", "num_examples", "names"), list)
        fields = read_fields(content.metadata, num_classes=int, supports_metrics=bool, **lists)
        fields |= {name: read_text(content.metadata.get(name), name) for name in texts}
        fields["version"] = read_text(content.metadata.get("version"), "version", max_length=40)
        counts, names = read_numbers(fields["num_examples"], "num_examples"), fields["names"]
        if not clients or not len(clients) == len(counts) == len(names):
            raise WireError(f"the node has {len(clients)} clients, {len(counts)} example counts, {len(names)} names")
        if not TASK_NAME.fullmatch(fields["task"]):
            raise WireError("the task is not the name of a task")
        _require_hexadecimal(fields["masking_key"], "masking key")
        _require_hexadecimal(fields["base_digest"], "digest of the pretrained model")
        if read_number(fields["num_classes"], "num_classes", at_least=1) > MAX_CLASSES:
            raise WireError(f"the task has {fields['num_classes']} classes, expected at most {MAX_CLASSES}")
        fields["num_examples"] = dict(zip(clients, counts, strict=True))
        fields["names"] = {
            client: read_text(name, "names", max_length=100) for client, name in zip(clients, names, strict=True)
        }
        return cls(node_id=node_id, site=site, layout=read_layout(fields.pop("leaves")), **fields)


class Membership:
    """The members of a federation.

    Args:
        check: function that raises `WireError` for a node that may not have its clients.
        find_task: function from the name of a task to the task. It raises `SettingError` for an unknown name, and
            imports only code that the operator of the coordinator has registered. Default: the shipped tasks.
        sites: sites of the run; default: all sites.

    Attributes:
        present: admitted and connected nodes, by Flower's id.
        refused: reason of the refusal of each other node, by Flower's id.
        postponed: transient problem of each node that is asked again within seconds, by Flower's id.
        pending: nodes with an unanswered hello request, by Flower's id.
        expected: clients that took part, and that did not miss a deadline since. A round waits for their nodes.
    """

    def __init__(
        self,
        check: Callable[[Member], None] = lambda member: None,
        find_task: Callable[[str], Task] = as_task,
        sites: RunSites | None = None,
    ) -> None:
        self._check, self._find_task, self.sites = check, find_task, sites or RunSites()
        self.present: dict[int, Member] = {}
        self.refused: dict[int, str] = {}
        self.pending: set[int] = set()
        self.postponed: dict[int, str] = {}
        self._retry_at: dict[int, float] = {}
        self.expected: set[ClientId] = set()
        self._last_nodes: dict[ClientId, int] = {}
        self._model: Member | None = None
        self._num_examples: dict[ClientId, int] = {}  # example counts at the first admission of this run
        self._last_site: dict[ClientId, str] = {}  # site of each client that has joined

    def remove_except(self, connected: Collection[int]) -> None:
        """Remove the nodes that are no longer connected."""
        for node_id in [node_id for node_id in self.present if node_id not in connected]:
            log.warning("%s is disconnected", self.present.pop(node_id))
        self.pending &= set(connected)
        for problems in (self.refused, self.postponed):
            for node_id in problems.keys() - set(connected):
                del problems[node_id]

    def nodes_to_greet(self, connected: Collection[int]) -> list[int]:
        """Return the nodes that need a hello request: new nodes, and later the refused and the postponed nodes."""
        now, new = time.monotonic(), set(connected) - self.present.keys() - self.pending
        return sorted(node_id for node_id in new if self._retry_at.get(node_id, now) <= now)

    def admit(self, member: Member) -> None:
        """Add a node to the members.

        Raises:
            WireError: The node may not have its clients, or another node has one of them. The number of examples of a
                client changed. The task is unknown. The model differs from the model of the federation.
        """
        self.task_of(member)
        members = self.members_by_client()
        taken = [client for client in member.clients if client in members]
        if taken:
            owners = f"{self.sites.name(members[taken[0]].node_id)} and {self.sites.name(member.node_id)}"
            raise WireError(f"{owners} both claim client {taken[0]}; give each client to one site")
        if self._model is not None and _task_and_layout(member) != _task_and_layout(self._model):
            raise WireError(f"{member} does not fit {self._model}: {_difference(member, self._model)}")
        self.refused.pop(member.node_id, None)
        self.postponed.pop(member.node_id, None)
        for client, count in member.num_examples.items():
            first = self._num_examples.get(client, count)
            if count != first:
                raise WireError(f"client {client} had {first} examples when this run started, and now it has {count}")
        self._check(member)
        self._num_examples |= member.num_examples
        self._last_site |= dict.fromkeys(member.clients, self.sites.name(member.node_id))
        self.expected -= {client for client, node_id in self._last_nodes.items() if node_id == member.node_id}
        self.expected |= set(member.clients)
        self._last_nodes |= dict.fromkeys(member.clients, member.node_id)
        self.present[member.node_id] = member
        suffix = "" if member.supports_metrics else ", without metrics"
        log.info("%s has joined (%s on %s%s)", member, member.framework, member.device, suffix)

    def task_of(self, member: Member) -> Task:
        """Return the task of a member.

        Raises:
            WireError: The coordinator does not know the task.
        """
        try:
            return self._find_task(member.task)
        except SettingError as error:
            raise WireError(f"the task is {error.value}, expected {error.expected}") from error

    def refuse(self, node_id: int, reason: str) -> None:
        """Refuse a node for `RETRY_INTERVAL_S`, and keep the reason."""
        self.refused[node_id] = reason
        self.postponed.pop(node_id, None)
        self._retry_at[node_id] = time.monotonic() + RETRY_INTERVAL_S
        log.warning("%s is refused: %s", self.sites.name(node_id), reason)

    def postpone(self, node_id: int, reason: str) -> None:
        """Ask a node with a transient problem again after `POSTPONE_INTERVAL_S`."""
        if self.postponed.get(node_id) != reason:
            log.warning("%s is asked again: %s", self.sites.name(node_id), reason)
        self.postponed[node_id] = reason
        self._retry_at[node_id] = time.monotonic() + POSTPONE_INTERVAL_S

    def forget_clients(self, clients: Collection[ClientId]) -> None:
        """Remove the nodes of these clients, so that they receive a new hello request."""
        for node_id in [node_id for node_id, member in self.present.items() if set(member.clients) & set(clients)]:
            del self.present[node_id]

    @property
    def model(self) -> Member:
        """A member with the model of the run."""
        assert self._model is not None, "no site has joined"
        return self._model

    def fix_model(self) -> None:
        """Fix the model that most of the present members have, and refuse the other members."""
        members = sorted(self.present.values(), key=lambda member: member.clients)
        counts = Counter(_task_and_layout(member) for member in members)
        self._model = model = next(m for m in members if _task_and_layout(m) == counts.most_common(1)[0][0])
        for member in members:
            if _task_and_layout(member) != _task_and_layout(model):
                del self.present[member.node_id]
                self.refuse(member.node_id, f"{member} does not fit {model}: {_difference(member, model)}")

    def site_of(self, clients: Collection[ClientId]) -> str:
        """Return the name of the site with these clients, for a message."""
        return next((self._last_site[client] for client in clients if client in self._last_site), STRANGER)

    def absence_of(self, client: ClientId) -> str:
        """Return the reason of the failure of a client whose node is not connected."""
        return f"{self.site_of([client])} is not connected" if client in self._last_site else NOT_CONNECTED

    def members_by_client(self) -> dict[ClientId, Member]:
        """Return the member of each client."""
        return {client: member for member in self.present.values() for client in member.clients}

    @property
    def num_parties(self) -> int:
        """Number of distinct masking keys of the present nodes, at least 1; a node without a key counts as a party."""
        return max(1, len({member.masking_key or node_id for node_id, member in self.present.items()}))

    def report(self) -> list[str]:
        """Return one line per node: joined, refused with the reason, or silent."""
        lines = [f"  joined    {member}" for member in self.present.values()]
        lines += [f"  refused   {self.sites.name(node)}: {reason}" for node, reason in sorted(self.refused.items())]
        lines += [f"  waiting   {self.sites.name(node)}: {reason}" for node, reason in sorted(self.postponed.items())]
        silent, problem = (
            sorted(self.pending - self.postponed.keys()),
            "is connected, but its trainer has not responded",
        )
        return lines + [f"  silent    {self.sites.name(node)} {problem}" for node in silent]


def read_layout(values: Any) -> Layout:
    """Return the layout of a model from an untrusted JSON value.

    Raises:
        WireError: A leaf has a wrong form, or two leaves have the same name.
    """
    leaves = []
    for value in values if type(values) is list else [None]:
        if type(value) is not list or len(value) != 4 or type(value[3]) is not bool or value[2] not in DTYPES:
            raise WireError(f"the leaf {value!r:.60} of a layout is not [name, shape, dtype, is_buffer]")
        shape = tuple(read_number(size, "shape") for size in read_numbers(value[1], "shape"))
        leaves.append(Leaf(read_text(value[0], "leaf", max_length=500), shape, value[2], value[3]))
    layout = Layout(tuple(leaves))
    names = [leaf.name for leaf in leaves]
    if names != sorted(set(names)) or layout.num_parameters > MAX_PARAMETERS:
        raise WireError("the leaves of a layout are not in order of their names, or have too many parameters")
    return layout


def _require_hexadecimal(text: str, name: str) -> None:
    """Refuse a text that is neither empty nor 32 bytes."""
    try:
        length = len(bytes.fromhex(text))
    except ValueError:
        length = -1
    if length not in (0, 32):
        raise WireError(f"the {name} is not 32 bytes in hexadecimal")


def _task_and_layout(member: Member) -> tuple[str, str, int, str, str]:
    return member.name, member.task, member.num_classes, member.layout.digest, member.base_digest


def _difference(member: Member, other: Member) -> str:
    """Return the first difference between the models of two members."""
    for leaf, expected in zip_longest(member.layout.leaves, other.layout.leaves):
        if leaf != expected:
            return f"its model has {_describe_leaf(leaf)}, and the other model has {_describe_leaf(expected)}"
    if member.base_digest != other.base_digest:
        bases = [m.base_digest or "none" for m in (member, other)]
        return f"the SHA-256 of its pretrained model is {bases[0]}, and of the other model {bases[1]}"
    return f"it has {member.name} ({member.task}, {member.num_classes}), the other {other.name} ({other.task})"


def _describe_leaf(leaf: Leaf | None) -> str:
    return f"{leaf.name} {'x'.join(map(str, leaf.shape))}" if leaf else "nothing"
