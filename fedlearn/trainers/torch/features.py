"""Record the features of a PyTorch model: the inputs of its last layer.

Shapes: B batch, F features, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedlearn.trainers.base import require_features


def record_features(
    module: nn.Module, run: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Return the outputs of a module, ``(B, C)``, and a function that returns the features of the batch, ``(B, F)``.

    The features are the inputs of the last ``nn.Linear``. Its outputs must be the outputs of the module. The model must
    have trainable parameters before this layer, and one feature vector per example. Otherwise the function raises
    `SettingError`.

    Args:
        module: the model.
        run: calls the module and returns its outputs.
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

    def features() -> torch.Tensor:
        last = next((call for call in calls if call[2] is outputs_BC), None)
        require_features(last is not None and last[1].ndim == 2 and _has_trainable_parameters_before(module, last[0]))
        assert last is not None
        return last[1]

    return outputs_BC, features


def _has_trainable_parameters_before(module: nn.Module, last: nn.Module) -> bool:
    last_parameters = set(last.parameters())
    return any(p.requires_grad and p not in last_parameters for p in module.parameters())
