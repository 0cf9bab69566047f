"""Names of the parameters of low-rank adapters, the same in torch and JAX."""

from __future__ import annotations

from typing import NamedTuple

from fedlearn.core.layout import Layout

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"  # endings of the names, as in peft
LORA_MERGED = ".lora_merged.weight"  # ending of the name of a matrix that collects products of merged adapters


class Adapter(NamedTuple):
    """Name the matrices of an adapted map: ``W x`` becomes ``(W + s (M + B A)) x``, with a fixed scale s.

    Attributes:
        first: name of A, rank x inputs.
        second: name of B, outputs x rank.
        merged: name of M, outputs x inputs. Only mergeable models have it; see `is_mergeable`.
    """

    first: str
    second: str
    merged: str


def find_adapters(layout: Layout) -> tuple[Adapter, ...]:
    """Return the names of all adapters in a layout, in order."""
    layers = [leaf.name.removesuffix(LORA_A) for leaf in layout.leaves if leaf.name.endswith(LORA_A)]
    return tuple(Adapter(f"{layer}{LORA_A}", f"{layer}{LORA_B}", f"{layer}{LORA_MERGED}") for layer in layers)


def is_mergeable(layout: Layout) -> bool:
    """Return whether a model has adapters, each with a matrix into which a server can merge it."""
    adapters, names = find_adapters(layout), {leaf.name for leaf in layout.leaves}
    return bool(adapters) and all(adapter.merged in names for adapter in adapters)
