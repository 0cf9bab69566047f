"""Orders and results as bytes: safetensors, with what is no array as JSON in the header; knows NumPy only.

Shapes: K clients, D parameters laid flat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import (  # fmt: skip
    Array,
    ClientId,
    ExampleDP,
    Failure,
    LocalSettings,
    MetricSum,
    Predictions,
    Request,
    State,
    Updates,
)

Result = Updates | Predictions | Failure
METADATA_KEY = "facts"


def serialize(arrays: Mapping[str, Any], **facts: Any) -> bytes:
    """Arrays of any library, and facts."""
    own = {name: np.ascontiguousarray(as_numpy(array)) for name, array in arrays.items()}
    return to_safetensors(own, metadata={METADATA_KEY: json.dumps(facts)})


def deserialize(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays; safetensors itself reads facts from files only, where they are JSON after its length."""
    length = int.from_bytes(data[:8], "little")
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])
    return facts, from_safetensors(data)


def serialize_request(request: Request, state: State) -> bytes:
    """An order to one client, with what it has kept for itself."""
    arrays = {"params": request.params_D, **_under("broadcast", request.broadcast), **_under("memory", state)}
    return serialize(arrays, round=request.round, seed=request.seed, local=asdict(request.local))


def deserialize_request(data: bytes) -> tuple[Request, State]:
    """The order in a letter, and the client's memory."""
    facts, arrays = deserialize(data)
    private = facts["local"].pop("example_dp")
    local = LocalSettings(**facts.pop("local"), example_dp=ExampleDP(**private) if private else None)
    order = Request(**facts, local=local, params_D=arrays["params"], broadcast=_those_under("broadcast", arrays))
    return order, _those_under("memory", arrays)


def serialize_model(params_D: Array, state: State | None = None) -> bytes:
    """Parameters to evaluate; with a ``state`` (it may be empty), those of the client's own model."""
    return serialize({"params": params_D, **_under("memory", state or {})}, own=state is not None)


def deserialize_model(data: bytes) -> tuple[np.ndarray, State | None]:
    """The parameters in a letter, and the client's memory if its own model is asked for."""
    facts, arrays = deserialize(data)
    return arrays["params"], _those_under("memory", arrays) if facts["own"] else None


def serialize_result(result: Result | None) -> bytes:
    """What one client brings back; an empty letter for None."""
    if result is None:
        return serialize({})
    if isinstance(result, Failure):
        return serialize({}, stage=result.stage, reason=result.reason, traceback=result.traceback)
    if isinstance(result, Predictions):
        return serialize({"outputs": result.outputs, "targets": result.targets})
    arrays = {name: getattr(result, name) for name in ("delta_KD", "num_examples_K", "num_steps_K", "num_bytes_K")}
    arrays |= _under("memory", result.client_state) | _under("extra", result.extra)
    arrays |= _under("total", {name: one.total_K for name, one in result.metrics.items()})
    arrays |= _under("count", {name: one.count_K for name, one in result.metrics.items()})
    return serialize(arrays)


def deserialize_result(data: bytes, client: ClientId) -> Result | None:
    """What a client has brought back."""
    facts, arrays = deserialize(data)
    if facts:
        return Failure(client=client, **facts)
    if not arrays:
        return None
    if "outputs" in arrays:
        return Predictions(client=client, **arrays)
    totals, counts = _those_under("total", arrays), _those_under("count", arrays)
    return Updates(
        clients_K=np.array([client]),
        delta_KD=arrays["delta_KD"],
        num_examples_K=arrays["num_examples_K"],
        num_steps_K=arrays["num_steps_K"],
        num_bytes_K=arrays["num_bytes_K"],
        metrics={name: MetricSum(totals[name], counts[name]) for name in totals},
        client_state=_those_under("memory", arrays),
        extra=_those_under("extra", arrays),
    )


def _under(group: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": array for name, array in arrays.items()}


def _those_under(group: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}
