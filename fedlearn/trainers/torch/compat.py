"""Undocumented names of PyTorch that fedlearn uses: tensors inside ``vmap``, compiled modules, products of oneDNN.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C import _functorch

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _find_fast_linear() -> Linear | None:
    """Return the affine map of oneDNN for tensors of float32, ``(x, weight_OF, bias)``; None if torch lacks it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x, weight_OF, bias: run(x.contiguous(), weight_OF, bias, "none", [], "")


fast_linear = _find_fast_linear()


def physical_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """Return the whole tensor of a tensor inside ``vmap``, and its batch axis; None if it has no batch axis."""
    if not _functorch.is_batchedtensor(tensor):
        return None
    physical: torch.Tensor = _functorch.get_unwrapped(tensor)
    if _functorch.is_batchedtensor(physical):
        raise ValueError("a tensor inside two calls of vmap")
    return physical, _functorch.maybe_get_bdim(tensor)


def with_batch_axis(tensor: torch.Tensor, like: torch.Tensor, size: int) -> torch.Tensor:
    """Return a tensor inside ``vmap`` that has one equal copy per example, at axis 0.

    Args:
        tensor: tensor without a batch axis.
        like: tensor with a batch axis of the same ``vmap``.
        size: batch size B.
    """
    level = _functorch.maybe_get_level(like)
    batched: torch.Tensor = _functorch._add_batch_dim(tensor.expand(size, *tensor.shape), 0, level)
    return batched


def without_compiler(module: nn.Module) -> nn.Module:
    """Return a module without ``torch.compile`` and ``DataParallel``, also in its parts. Their names have no prefix."""
    plain: Any = module
    while isinstance(plain, nn.DataParallel) or hasattr(plain, "_orig_mod"):
        plain = plain.module if isinstance(plain, nn.DataParallel) else plain._orig_mod
    plain._compiled_call_impl = None  # set by ``module.compile()``
    for name, part in plain.named_children():
        inner = without_compiler(part)
        if inner is not part:
            setattr(plain, name, inner)
    result: nn.Module = plain
    return result
