"""What a PyTorch model hands to its last layer.

Shapes: B batch, F features, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedlearn.trainers.base import require_features


def with_features(module: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs that ``run`` gets of a module (B x C), and their features (B x F).

    Features are the inputs of the ``nn.Linear`` whose outputs are the module's own: nothing may come after it.

    Raises:
        SettingError: there is no such layer, nothing is learnt before it, or an example has several vectors of them.
    """
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def watch(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        calls.append((layer, inputs[0], output))

    hooks = [part.register_forward_hook(watch) for part in module.modules() if isinstance(part, nn.Linear)]
    try:
        outputs_BC = run()
    finally:
        for hook in hooks:
            hook.remove()
    last = next((call for call in calls if call[2] is outputs_BC), None)
    require_features(last is not None and last[1].ndim == 2 and _learns_before(module, last[0]))
    assert last is not None
    return outputs_BC, last[1]


def _learns_before(module: nn.Module, last: nn.Module) -> bool:
    own = set(last.parameters())
    return any(p.requires_grad and p not in own for p in module.parameters())
