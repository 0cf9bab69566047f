"""Keep the inputs of the first block with trained parameters, so that later passes skip the frozen blocks below it.

Shapes: N rows of a pass, T positions, H features of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fedlearn.core.inputs import map_inputs
from fedlearn.trainers.torch.flat_model import FlatModel

MAX_SHARE = 0.2  # largest size of the kept inputs, as a share of the size of the frozen parameters


class FrozenPrefix:
    """Compute the frozen blocks of a model once for each example.

    The blocks are the items of an ``nn.ModuleList``, which pass ``(N, T, H)`` to each other as first argument. The
    model must draw no random numbers. The key of an example is its content.

    Args:
        model: the model.
    """

    def __init__(self, model: FlatModel) -> None:
        blocks = _frozen_blocks(model.module.inner)
        self._below = blocks[:-1]
        self._first = blocks[-1] if blocks else None
        frozen = [p for p in model.module.parameters() if not p.requires_grad]
        self._free = int(MAX_SHARE * sum(p.numel() * p.element_size() for p in frozen))
        self._kept: dict[bytes, torch.Tensor] = {}
        self.is_active = bool(self._below) and model.device == "cpu"

    def keys(self, x_N: Any) -> list[bytes]:
        """Return the key of each row."""
        parts: list[torch.Tensor] = []
        map_inputs(parts.append, x_N)
        rows = [part.contiguous().numpy().reshape(len(part), -1) for part in parts]
        return [b"".join(part[i].tobytes() for part in rows) for i in range(len(rows[0]))]

    def __contains__(self, key: bytes) -> bool:
        """Return whether the inputs of this row are kept."""
        return key in self._kept

    @contextmanager
    def using(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Skip the frozen blocks in this block of code, or keep their results. The rows are all kept, or none is."""
        with ExitStack() as stack:
            if self.is_active and self._first is not None:
                if keys[0] in self._kept:
                    self._skip(stack, [self._kept[key] for key in keys])
                else:
                    handle = self._first.register_forward_pre_hook(lambda _, inputs: self._keep(keys, inputs))
                    stack.callback(handle.remove)
            yield

    def _skip(self, stack: ExitStack, rows: Sequence[torch.Tensor]) -> None:
        """Replace the frozen blocks by their kept results, in the width of the pass."""
        assert self._first is not None
        for block in self._below:
            block.forward = lambda x, *others, **named: x
            stack.callback(vars(block).pop, "forward")

        def replace(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = torch.zeros_like(inputs[0])
            for row, kept in zip(hidden, rows, strict=True):
                width = min(len(row), len(kept))
                row[:width] = kept[:width]
            return hidden, *inputs[1:]

        handle = self._first.register_forward_pre_hook(replace)
        stack.callback(handle.remove)

    def _keep(self, keys: Sequence[bytes], inputs: tuple[Any, ...]) -> None:
        """Keep the inputs of the first trained block while there is memory."""
        hidden = inputs[0] if inputs else None
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or len(hidden) != len(keys) or hidden.requires_grad:
            self.is_active = False
            return
        for key, row in zip(keys, hidden, strict=True):
            size = row.numel() * row.element_size() + len(key)
            if size <= self._free:
                self._free -= size
                self._kept[key] = row.clone()


def _frozen_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the frozen blocks at the start of the largest list of blocks, and the block after them; else nothing."""
    found: list[nn.Module] = []
    for blocks in (part for part in module.modules() if isinstance(part, nn.ModuleList)):
        tuned = [any(p.requires_grad for p in block.parameters()) for block in blocks]
        first = tuned.index(True) if any(tuned) else 0
        if first and len(found) <= first:
            found = list(blocks[: first + 1])
    return found
