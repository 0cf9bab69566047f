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

from fedlearn.arrays import as_numpy
from fedlearn.records import (
    Array,
    ClientId,
    ExampleDP,
    Failure,
    LocalSettings,
    Memory,
    Order,
    Predictions,
    Sum,
    Updates,
)  # fmt: skip

Result = Updates | Predictions | Failure
FACTS = "facts"


def sealed(arrays: Mapping[str, Any], **facts: Any) -> bytes:
    """Arrays of any library, and facts."""
    own = {name: np.ascontiguousarray(as_numpy(array)) for name, array in arrays.items()}
    return to_safetensors(own, metadata={FACTS: json.dumps(facts)})


def opened(letter: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays; safetensors itself reads facts from files only, where they are JSON after its length."""
    length = int.from_bytes(letter[:8], "little")
    facts = json.loads(json.loads(letter[8 : 8 + length])["__metadata__"][FACTS])
    return facts, from_safetensors(letter)


def order_letter(order: Order, memory: Memory) -> bytes:
    """An order to one client, with what it has kept for itself."""
    arrays = {"params": order.params_D, **_under("broadcast", order.broadcast), **_under("memory", memory)}
    return sealed(arrays, round=order.round, seed=order.seed, local=asdict(order.local))


def order_of(letter: bytes) -> tuple[Order, Memory]:
    """The order in a letter, and the client's memory."""
    facts, arrays = opened(letter)
    private = facts["local"].pop("example_dp")
    local = LocalSettings(**facts.pop("local"), example_dp=ExampleDP(**private) if private else None)
    order = Order(**facts, local=local, params_D=arrays["params"], broadcast=_those_under("broadcast", arrays))
    return order, _those_under("memory", arrays)


def model_letter(params_D: Array, memory: Memory | None = None) -> bytes:
    """Parameters to evaluate; with a ``memory`` (it may be empty), those of the client's own model."""
    return sealed({"params": params_D, **_under("memory", memory or {})}, own=memory is not None)


def model_of(letter: bytes) -> tuple[np.ndarray, Memory | None]:
    """The parameters in a letter, and the client's memory if its own model is asked for."""
    facts, arrays = opened(letter)
    return arrays["params"], _those_under("memory", arrays) if facts["own"] else None


def result_letter(result: Result | None) -> bytes:
    """What one client brings back; an empty letter for None."""
    if result is None:
        return sealed({})
    if isinstance(result, Failure):
        return sealed({}, stage=result.stage, reason=result.reason, traceback=result.traceback)
    if isinstance(result, Predictions):
        return sealed({"outputs": result.outputs, "targets": result.targets})
    arrays = {name: getattr(result, name) for name in ("delta_KD", "num_examples_K", "num_steps_K", "num_bytes_K")}
    arrays |= _under("memory", result.memory) | _under("extra", result.extra)
    arrays |= _under("total", {name: one.total_K for name, one in result.metrics.items()})
    arrays |= _under("count", {name: one.count_K for name, one in result.metrics.items()})
    return sealed(arrays)


def result_of(letter: bytes, client: ClientId) -> Result | None:
    """What a client has brought back."""
    facts, arrays = opened(letter)
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
        metrics={name: Sum(totals[name], counts[name]) for name in totals},
        memory=_those_under("memory", arrays),
        extra=_those_under("extra", arrays),
    )


def _under(group: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": array for name, array in arrays.items()}


def _those_under(group: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}
