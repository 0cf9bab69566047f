"""Pack a training order as the shared content of a request, and read it with all checks.

Shapes: D parameters.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from fedlearn.core.layout import Layout
from fedlearn.core.named_option import describe_option, option_name
from fedlearn.core.records import ExampleDP, LocalSettings, Request
from fedlearn.core.serialization import Payload, WireError, read_fields, require_vector, select_prefix, with_prefix
from fedlearn.errors import require

FIXES = {"optimizer": "adam", "schedule": "cosine"}


def pack_order(request: Request) -> Payload:
    """Return a training order as the shared content of requests.

    Raises:
        SettingError: The optimizer or the schedule is a function. A message to a node contains no code.
    """
    for name in ("optimizer", "schedule"):
        option = getattr(request.local, name)
        expected, fix = "a name: a message to a node contains no code", f"local.{name}={FIXES[name]}"
        require(option_name(option) is not None, f"local.{name}", describe_option(option), expected, fix)
    arrays = {"params": request.params_D, **with_prefix("broadcast/", request.broadcast)}
    return Payload(metadata={"seed": request.seed, "local": asdict(request.local)}, arrays=arrays)


def read_order(payload: Payload, round: int) -> Request:
    """Return the training order in the shared content of a request.

    Raises:
        WireError: An array is missing or unknown, or a setting is out of range.
    """
    fields = read_fields(payload.metadata, seed=int, local=dict)
    arrays = dict(payload.arrays)
    params_D = arrays.pop("params", None)
    unknown = [name for name in arrays if not name.startswith("broadcast/")]
    if params_D is None or unknown or fields["seed"] < 0:
        raise WireError("the training order has other fields; expected parameters, broadcasts and a seed >= 0")
    try:
        private = fields["local"].get("example_dp")
        local = LocalSettings(**{**fields["local"], "example_dp": ExampleDP(**private) if private else None})
    except (TypeError, ValueError) as error:
        raise WireError(f"the local settings cannot be read: {error}") from error
    broadcast = select_prefix(arrays, "broadcast/")
    return Request(round=round, seed=fields["seed"], params_D=params_D, broadcast=broadcast, local=local)


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
