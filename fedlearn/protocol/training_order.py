"""Pack a training order as the shared content of a request, and read it with all checks.

Shapes: K clients of a node, D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.named_option import describe_option, option_name
from fedlearn.core.records import Array, ClientId, ExampleDP, LocalSettings, Request
from fedlearn.core.serialization import Payload, WireError, read_fields, require_vector, select_prefix, with_prefix
from fedlearn.errors import require

FIXES = {"optimizer": "adam", "schedule": "cosine"}


def pack_order(request: Request) -> Payload:
    """Return a training order as the shared content of requests, without the models of single clients.

    Raises:
        SettingError: The optimizer or the schedule is a function. A message to a node contains no code.
    """
    for name in ("optimizer", "schedule"):
        option = getattr(request.local, name)
        expected, fix = "a name: a message to a node contains no code", f"local.{name}={FIXES[name]}"
        require(option_name(option) is not None, f"local.{name}", describe_option(option), expected, fix)
    arrays = with_prefix("broadcast/", request.broadcast)
    if not request.client_models:
        arrays["params"] = request.params_D
    return Payload(metadata={"seed": request.seed, "local": asdict(request.local)}, arrays=arrays)


def pack_client_models(request: Request, clients: Sequence[ClientId]) -> Payload:
    """Return the models of the clients of one node as the content of its request; empty for one global model."""
    models = request.for_clients(clients).client_models
    return Payload(arrays={"models": np.stack([as_numpy(model_D) for model_D in models.values()])} if models else {})


def read_client_models(content: Payload, clients: Sequence[ClientId], layout: Layout) -> dict[ClientId, np.ndarray]:
    """Return the model of each client in the content of a request to a node.

    Args:
        content: content for the node.
        clients: clients of the request, in the order of the rows.
        layout: layout of the model.

    Raises:
        WireError: The content has other fields, or the models have another shape or dtype, or are not finite.
    """
    if content.metadata or content.arrays.keys() != {"models"}:
        raise WireError("the strategy sends each client its own model; expected the models of the clients")
    models_KD = content.arrays["models"]
    require_vector(models_KD, (len(clients), layout.num_parameters), "models")
    return dict(zip(clients, models_KD, strict=True))


def read_order(payload: Payload, round: int, client_models: Mapping[ClientId, Array] | None = None) -> Request:
    """Return the training order in the shared content of a request.

    Args:
        payload: shared content of the request.
        round: round of the request.
        client_models: model of each client, if they replace the global model. ``params_D`` of the order is then the
            first of them, and the content has no global model.

    Raises:
        WireError: An array is missing or unknown, or a setting is out of range.
    """
    fields = read_fields(payload.metadata, seed=int, local=dict)
    arrays = dict(payload.arrays)
    params_D = next(iter(client_models.values())) if client_models else arrays.pop("params", None)
    unknown = [name for name in arrays if not name.startswith("broadcast/")]
    if params_D is None or unknown or fields["seed"] < 0:
        raise WireError("the training order has other fields; expected parameters, broadcasts and a seed >= 0")
    try:
        private = fields["local"].get("example_dp")
        local = LocalSettings(**{**fields["local"], "example_dp": ExampleDP(**private) if private else None})
    except (TypeError, ValueError) as error:
        raise WireError(f"the local settings cannot be read: {error}") from error
    broadcast = select_prefix(arrays, "broadcast/")
    return Request(
        round=round,
        seed=fields["seed"],
        params_D=params_D,
        broadcast=broadcast,
        local=local,
        client_models=client_models or {},
    )


def require_order_fits(request: Request, layout: Layout) -> None:
    """Refuse a training order whose vectors do not fit a layout or are not finite.

    Raises:
        WireError: A vector has another shape or dtype, or is not finite.
    """
    require_vector(request.params_D, (layout.num_parameters,), "params")
    for name, vector in request.broadcast.items():
        if not name.startswith("stage/"):
            require_vector(vector, (layout.num_parameters,), f"broadcast {name}")
        elif vector.dtype.kind != "f" or not np.isfinite(vector).all():  # e.g. a clip norm, of any shape
            raise WireError(f"broadcast {name} is not finite")
