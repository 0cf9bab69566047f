"""What a coordinator asks of a node: the writing end and the reading end side by side, so that they change together.

Shapes: D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedlearn.core.layout import Layout, Leaf
from fedlearn.core.records import Array, ClientId, ExampleDP, LocalSettings, Request
from fedlearn.core.serialization import Payload, WireError, pack, read_fields, require_vector, select_prefix

REQUEST_KINDS = ("hello", "init", "fit", "mask", "evaluate")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestHeader:
    """What every request says of itself; the reply repeats ``kind``, ``run``, ``round`` and ``id``.

    Args:
        kind: ``hello``, ``init``, ``fit``, ``mask`` (a message of secure aggregation) or ``evaluate``.
        run: names the federated run, the same across restarts of the coordinator.
        round: from 1; 0 before the first.
        id: drawn anew for each request, so that no earlier reply can stand for it.
        clients: asked, ascending; none for ``hello``, which asks who is there.
        settings: settings from which the node builds scenario and strategy.
        layout: digest of the coordinator's layout; empty for ``hello``.
    """

    kind: str
    run: str
    round: int
    id: str
    settings: Mapping[str, Any]
    clients: tuple[ClientId, ...] = ()
    layout: str = ""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> RequestHeader:
        """From the facts of a request.

        Raises:
            WireError: one is missing or of another kind.
        """
        given = read_fields(metadata, kind=str, run=str, round=int, id=str, settings=dict, clients=list, layout=str)
        if given["kind"] not in REQUEST_KINDS:
            raise WireError(f"the request is a {given['kind']}, expected one of {', '.join(REQUEST_KINDS)}")
        clients = tuple(given.pop("clients"))
        if not all(type(client) is int for client in clients):
            raise WireError(f"the request names the clients {clients}, expected whole numbers")
        return cls(clients=clients, **given)


def pack_request(header: RequestHeader, **facts: Any) -> bytes:
    """What one node is asked; what all are asked alike follows it (`pack_request_body`, `pack_model_body`)."""
    return pack(Payload(metadata={**facts, **asdict(header)}))


def pack_request_body(request: Request) -> bytes:
    """An order, for all nodes; each request says besides from which memories (``since``) its clients start."""
    arrays = {"params": request.params_D}
    arrays |= {f"broadcast/{name}": vector_D for name, vector_D in request.broadcast.items()}
    return pack(Payload(metadata={"seed": request.seed, "local": asdict(request.local)}, arrays=arrays))


def pack_model_body(params_D: Array) -> bytes:
    """Parameters to evaluate, for all nodes; a request that says ``since`` asks for clients' own models with them."""
    return pack(Payload(metadata={}, arrays={"params": params_D}))


def read_request(payload: Payload, layout: Layout) -> tuple[Request, dict[ClientId, int]]:
    """The order in a request, and the round whose memory each client starts from.

    Raises:
        WireError: it is for another model, or a setting is out of range.
    """
    facts = payload.metadata
    given = read_fields(facts, round=int, seed=int, local=dict)
    params_D = read_params(payload, layout)
    broadcast = select_prefix(payload.arrays, "broadcast/")
    for name, vector in broadcast.items():
        if name.startswith("stage/"):  # a stage's own, e.g. a clip norm
            if not (vector.dtype.kind == "f" and np.isfinite(vector).all()):
                raise WireError(f"broadcast {name} that arrived is not finite")
        else:
            require_vector(vector, (layout.num_parameters,), f"broadcast {name}")
    try:
        private = given["local"].get("example_dp")
        local = LocalSettings(**{**given["local"], "example_dp": ExampleDP(**private) if private else None})
    except (TypeError, ValueError) as error:
        raise WireError(f"the order's settings cannot be read: {error}") from error
    order = Request(round=given["round"], seed=given["seed"], params_D=params_D, broadcast=broadcast, local=local)
    return order, read_state_rounds(payload)


def read_state_rounds(payload: Payload) -> dict[ClientId, int]:
    """The round whose memory each client of a request goes on from.

    Raises:
        WireError: it does not say.
    """
    given = read_fields(payload.metadata, since=list, clients=list)
    try:
        return {int(client): int(n) for client, n in zip(given["clients"], given["since"], strict=True)}
    except (TypeError, ValueError) as error:
        raise WireError(f"the request's rounds of memories cannot be read: {error}") from error


def read_params(payload: Payload, layout: Layout) -> np.ndarray:
    """The parameters in a parcel.

    Raises:
        WireError: they are absent, not finite, or belong to another model.
    """
    if payload.metadata.get("layout") != layout.digest:
        raise WireError("the message speaks of a model with another layout (names, shapes or dtypes of parameters)")
    params_D = payload.arrays.get("params")
    if params_D is None:
        raise WireError("the message has no parameters")
    require_vector(params_D, (layout.num_parameters,), "the parameters")
    return params_D


def layout_to_json(layout: Layout) -> list[list[Any]]:
    """A layout as JSON."""
    return [[leaf.name, list(leaf.shape), leaf.dtype, leaf.is_buffer] for leaf in layout.leaves]


def layout_from_json(values: Any) -> Layout:
    """A layout from JSON.

    Raises:
        WireError: it is not one.
    """
    try:
        return Layout(
            tuple(
                Leaf(str(name), tuple(int(n) for n in shape), str(dtype), bool(buffer))
                for name, shape, dtype, buffer in values
            )
        )
    except (TypeError, ValueError) as error:
        raise WireError(f"the layout cannot be read: {error}") from error
