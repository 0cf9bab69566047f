"""Define the two messages of a deployment: the request to a node and its response.

Shapes: D parameters.

Both classes read untrusted bytes with a check of each field: ``unpack`` returns a valid message or raises `WireError`.
A request has two parts. The first part is for one node. The second part, `NodeRequest.shared`, is equal for all nodes
of a cohort, so Flower stores a large model once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fedlearn.core.records import ClientId, Failure, FailureStage
from fedlearn.core.serialization import (
    LENGTH_BYTES,
    Payload,
    WireError,
    pack_parts,
    read_fields,
    read_text,
    unpack,
)
from fedlearn.core.tensor_bytes import Buffer, num_bytes
from fedlearn.protocol.fields import (
    failure_to_json,
    read_client_ids,
    read_failures,
    read_number,
    read_numbers,
    require_requested,
)
from fedlearn.protocol.refusals import Refusal, RefusalCode, read_reference, read_refusal, refusal_to_json

MAX_REQUEST_BYTES = 2**33  # 8 GiB, for a model with two billion parameters
VERSION = 5  # version of the format; node and coordinator need the same version


class RequestKind(StrEnum):
    """The task of a request. The values are part of the message format."""

    HELLO = "hello"  # describe the node: its clients, model and framework
    INIT = "init"  # return initial parameters
    FIT = "fit"  # train the clients and return their updates
    MASK = "mask"  # respond to a message of secure aggregation; train the clients if the request has an order
    EVALUATE = "evaluate"  # return metric sums over held-out examples


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRequest:
    """A request to one node.

    Attributes:
        kind: task.
        run: name of the federated run, equal after a restart of the coordinator.
        round: round, from 1; 0 before the first round.
        id: random id, so that a response to an earlier request is recognized.
        settings: settings from which the node builds scenario, strategy and mechanism.
        clients: clients of the node, ascending; none for ``hello``.
        state_rounds: for each client, the round of the client state to start from; 0: the initial state. None: the
            request needs no client states.
        layout: digest of the coordinator's layout; empty for ``hello``.
        content: content for this node.
        shared: content that is equal for all nodes, e.g. a training order (`fedlearn.protocol.training_order`).
    """

    kind: RequestKind
    run: str
    round: int
    id: str
    settings: Mapping[str, Any]
    clients: tuple[ClientId, ...] = ()
    state_rounds: tuple[int, ...] | None = None
    layout: str = ""
    content: Payload = field(default_factory=Payload)
    shared: Payload = field(default_factory=Payload)

    def pack(self) -> bytes:
        """Return the request as bytes."""
        return b"".join(self.pack_parts())

    def pack_parts(self) -> list[Buffer]:
        """Return the bytes of the request in parts, without copies of its arrays."""
        return [*self.pack_head(), *pack_parts(self.shared)]

    def pack_head(self) -> list[Buffer]:
        """Return the bytes of the request without `shared`, in parts."""
        names = ("kind", "run", "round", "id", "settings", "clients", "state_rounds", "layout")
        head = _pack_with_content({name: getattr(self, name) for name in names}, self.content)
        return [num_bytes(head).to_bytes(LENGTH_BYTES, "little"), *head]

    @classmethod
    def unpack(cls, data: Buffer) -> NodeRequest:
        """Return the request in untrusted bytes. Its arrays are views of bytes that may be changed.

        Raises:
            WireError: The message is too large, damaged or of another version, or a field has a wrong type or value.
        """
        if len(data) > MAX_REQUEST_BYTES:
            raise WireError(f"the request has more than {MAX_REQUEST_BYTES} bytes")
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        if len(data) < LENGTH_BYTES or end > len(data):
            raise WireError(f"the payload cannot be read: {len(data)} bytes of a request of {end}")
        types, data = {"settings": dict, "clients": list}, memoryview(data)
        fields, content = _unpack_with_content(data[LENGTH_BYTES:end], {**types, "state_rounds": None})
        clients, rounds = read_client_ids(fields.pop("clients")), fields.pop("state_rounds")
        if list(clients) != sorted(clients):
            raise WireError(f"the clients {list(clients)[:10]} are not in ascending order")
        state_rounds = None if rounds is None else read_numbers(rounds, "state_rounds")
        if state_rounds is not None and len(state_rounds) != len(clients):
            raise WireError(f"the request has {len(clients)} clients and {len(state_rounds)} rounds of client states")
        shared = unpack(data[end:])
        return cls(**fields, clients=clients, state_rounds=state_rounds, content=content, shared=shared)

    def states_by_client(self) -> dict[ClientId, int]:
        """Return the round of the client state of each client.

        Raises:
            WireError: The request has no client states.
        """
        if self.state_rounds is None:
            raise WireError("the request has no state_rounds")
        return dict(zip(self.clients, self.state_rounds, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResponse:
    """A response of one node. It repeats ``kind``, ``run``, ``round``, ``id`` and ``layout`` of the request.

    Attributes:
        clients: clients with a result, in the order of the rows in ``content``.
        failures: clients that failed. Only their stages leave the node.
        refusal: reason why the request has no results; None if it has.
        content: the results.
        reference: reference of the failures in the log of the node; empty without failures.
    """

    kind: RequestKind
    run: str
    round: int
    id: str
    layout: str
    clients: tuple[ClientId, ...] = ()
    failures: tuple[Failure, ...] = ()
    refusal: Refusal | None = None
    content: Payload = field(default_factory=Payload)
    reference: str = ""

    @classmethod
    def to(cls, request: NodeRequest, **fields: Any) -> NodeResponse:
        """Return a response that repeats the identifying fields of a request."""
        return cls(**{name: getattr(request, name) for name in ("kind", "run", "round", "id", "layout")}, **fields)

    @classmethod
    def refuse(cls, request: NodeRequest | None, refusal: Refusal) -> NodeResponse:
        """Return a response without results.

        Args:
            request: the request; None if the node could not read it.
            refusal: reason of the refusal.
        """
        if request is None:
            return cls(kind=RequestKind.HELLO, run="", round=0, id="", layout="", refusal=refusal)
        return cls.to(request, refusal=refusal)

    @classmethod
    def missing(cls, request: NodeRequest, stage: FailureStage, reason: str) -> NodeResponse:
        """Return a response in place of a response that did not arrive or cannot be read."""
        return cls.refuse(request, Refusal(stage=stage, code=RefusalCode.CONNECTION, detail=reason))

    def pack(self) -> bytes:
        """Return the response as bytes."""
        return b"".join(self.pack_parts())

    def pack_parts(self) -> list[Buffer]:
        """Return the bytes of the response in parts, without copies of its arrays."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("kind", "run", "round", "id", "layout")}
        fields |= {"clients": self.clients, "failures": [failure_to_json(failure) for failure in self.failures]}
        fields["reference"] = self.reference
        fields["refusal"] = refusal_to_json(self.refusal) if self.refusal else None
        return _pack_with_content(fields, self.content)

    @classmethod
    def unpack(cls, data: Buffer, request: NodeRequest, *, max_bytes: int) -> NodeResponse:
        """Return the response to ``request`` in untrusted bytes.

        Raises:
            WireError: The message is too large, damaged or of another version. A field has a wrong type or value. The
                response is for another request, or has clients that are not in the request.
        """
        if len(data) > max_bytes:
            raise WireError(f"the response has {len(data)} bytes, expected at most {max_bytes}")
        fields, content = _unpack_with_content(
            data, {"clients": list, "failures": list, "reference": str, "refusal": None}
        )
        refusal, unread = read_refusal(fields.pop("refusal")), not fields["id"]
        for name in ("kind", "run", "round", "id", "layout"):
            value, expected = fields[name], getattr(request, name)
            if value != expected and not (refusal and unread):  # the node could not read the request
                raise WireError(f"the response is to another request: its {name} is {value!r}, expected {expected!r}")
        fields["reference"] = read_reference(fields)
        clients = read_client_ids(fields.pop("clients"))
        failures = read_failures(fields.pop("failures"), fields["reference"])
        if request.kind != RequestKind.HELLO:
            require_requested(clients, failures, request.clients)
        return cls(**fields, clients=clients, failures=failures, refusal=refusal, content=content)


def _pack_with_content(fields: Mapping[str, Any], content: Payload) -> list[Buffer]:
    return pack_parts(
        Payload(metadata={**fields, "version": VERSION, "content": content.metadata}, arrays=content.arrays)
    )


def _unpack_with_content(data: Buffer, types: Mapping[str, type | None]) -> tuple[dict[str, Any], Payload]:
    """Return the fields that requests and responses share, further fields, and the content."""
    payload = unpack(data)
    metadata = dict(payload.metadata)
    version = metadata.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise WireError(
            f"the message has format {version!r:.20}, expected {VERSION}: install equal versions of fedlearn"
        )
    common = {"kind": str, "run": str, "round": int, "id": str, "layout": str, "content": dict}
    if metadata.keys() != common.keys() | types.keys():
        raise WireError(f"the message has other fields: {sorted(metadata.keys() ^ (common.keys() | types.keys()))[:5]}")
    fields = read_fields(metadata, **common, **{name: kind for name, kind in types.items() if kind})
    fields |= {name: metadata[name] for name, kind in types.items() if kind is None}
    if fields["kind"] not in set(RequestKind):
        raise WireError(f"the kind is {fields['kind']!r:.60}, expected one of {', '.join(RequestKind)}")
    fields["kind"] = RequestKind(fields["kind"])
    fields["round"] = read_number(fields["round"], "round")
    for name in ("run", "id", "layout"):
        if read_text(fields[name], name) != fields[name]:
            raise WireError(f"the field {name} is {fields[name]!r:.60}, expected at most 200 printable characters")
    return fields, Payload(metadata=fields.pop("content"), arrays=payload.arrays)
