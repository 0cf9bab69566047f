"""Lay the parameters and buffers of a PyTorch module in one flat vector.

Shapes: D parameters, B batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlearn.core.inputs import map_inputs, split_inputs
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array
from fedlearn.trainers.torch.network import INNER, Network


class FlatModel:
    """Hold a module whose parameters and floating-point buffers are views of one flat vector.

    So one copy loads the global model, and one copy reads the local model. Integer buffers and buffers with
    ``persistent=False`` are not in the vector.

    Args:
        network: the model, on its device.
        device: device of torch.

    Attributes:
        layout: layout of the vector.
        leaves: trainable parameters, in the order of the layout.
        trained: layout of these parameters.
        flat_D: the vector.
        values: initial values of trainable parameters and buffers, by name.
        buffers: names of the buffers in the vector.
    """

    def __init__(self, network: Network, device: str) -> None:
        self.module, self.device = network, device
        module = network.inner
        buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        for name in _constants(module):
            buffers.pop(name, None)
        kept = set(map(id, buffers.values()))
        self._counters = [(b, b.clone()) for b in module.buffers() if id(b) not in kept]
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes, buffer_shapes = ([(name, tuple(t.shape)) for name, t in ts.items()] for ts in (trainable, buffers))
        self.layout = Layout.from_shapes(shapes, buffer_shapes)
        self.values = {name: t.detach().cpu().float().numpy().copy() for name, t in {**trainable, **buffers}.items()}
        self.buffers = tuple(buffers)
        self.flat_D = torch.from_numpy(self.layout.pack(self.values)).to(device)
        self.trained = self.layout.trainable  # without the frozen parameters of a rule, see `without`
        self.leaves = [trainable[leaf.name] for leaf in self.layout.trainable.leaves]
        for parameter, view in zip(self.leaves, self.split(self.flat_D), strict=True):
            parameter.data = view
        for name in buffers:
            _set_buffer(module, name, self.flat_D[self.layout.slices[name]].view(buffers[name].shape).data)
        self._names = [f"{INNER}.{leaf.name}" for leaf in self.layout.leaves]

    def without(self, frozen: tuple[str, ...]) -> FlatModel:
        """Return this model with fewer trained parameters; both share the module and the vector.

        Args:
            frozen: name patterns of the parameters that do not train.
        """
        other = copy(self)
        other.trained = self.layout.trainable.without(frozen)
        kept = {leaf.name for leaf in other.trained.leaves}
        other.leaves = [parameter for name, parameter in self.trainable.items() if name in kept]
        return other

    @property
    def buffer_values(self) -> dict[str, np.ndarray]:
        """Return the initial values of the buffers in the vector, by name."""
        return {name: self.values[name] for name in self.buffers}

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {leaf.name: p for leaf, p in zip(self.trained.leaves, self.leaves, strict=True)}

    def to_device(self, array: Array) -> torch.Tensor:
        """Return the array as a tensor on the device of the model."""
        return torch.as_tensor(array, device=self.device)

    def load(self, params_D: Array) -> None:
        """Copy parameters and buffers into the module."""
        self.flat_D.copy_(self.to_device(params_D))

    def reset_counters(self) -> None:
        """Set the buffers that are not in the vector to their initial values."""
        for counter, initial in self._counters:
            counter.copy_(initial)

    def split(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """Return views of a flat vector, one per trainable parameter."""
        return [vector_D[self.layout.slices[leaf.name]].view(leaf.shape) for leaf in self.trained.leaves]

    def inputs(self, array: np.ndarray) -> Any:
        """Return the inputs of a model on its device: a tensor, or a mapping or a tuple of tensors."""
        return map_inputs(self.to_device, split_inputs(array))

    def join(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return one tensor per trainable parameter as a flat vector, with 0 for buffers and frozen parameters."""
        vector_D = torch.zeros_like(self.flat_D)
        torch._foreach_copy_(self.split(vector_D), list(gradients))
        return vector_D

    def buffer_state(self) -> list[torch.Tensor]:
        """Return copies of all buffers."""
        return [buffer.clone() for buffer in self.module.buffers()]

    def set_buffers(self, values: Sequence[torch.Tensor]) -> None:
        """Set all buffers to these values."""
        for buffer, value in zip(self.module.buffers(), values, strict=True):
            buffer.copy_(value)

    def apply(self, params_D: torch.Tensor, x_B: Any) -> torch.Tensor:
        """Return the outputs of the module with these parameters."""
        slices = self.layout.slices
        views = [params_D[slices[leaf.name]].view(leaf.shape) for leaf in self.layout.leaves]
        leaves = dict(zip(self._names, views, strict=True))
        outputs: torch.Tensor = torch.func.functional_call(self.module, leaves, (x_B,))
        return outputs

    def network(self, params_D: Array) -> nn.Module:
        """Return a copy of the module of the user with these parameters, in evaluation mode."""
        self.load(params_D)
        self.reset_counters()
        network = deepcopy(self.module.inner).eval()
        for name in self.buffers:  # torch.save would store the whole base of a view
            _set_buffer(network, name, network.get_buffer(name).clone())
        return network


def _constants(module: nn.Module) -> list[str]:
    """Return the names of the buffers with ``persistent=False``."""
    parts = module.named_modules()
    return [f"{path}.{name}".lstrip(".") for path, part in parts for name in part._non_persistent_buffers_set]


def _set_buffer(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, buffer_name = name.rpartition(".")
    setattr(module.get_submodule(parent), buffer_name, tensor)
