"""Lay the parameters and buffers of a PyTorch module in one flat vector.

Shapes: D parameters, B batch, C outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlearn.core.inputs import map_inputs, split_inputs
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array
from fedlearn.trainers.torch.network import INNER, Network

MIN_LENT_BYTES = 2**22  # size of a vector from which on an update takes its memory
ALIGNMENT = 64  # bytes


@dataclass
class _Memory:
    """The flat vector of a module, and the update that was computed in it."""

    flat_D: torch.Tensor
    update: Callable[[], object | None] = lambda: None  # returns None when no caller uses the update any more

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the vector alone, because a copy has no update."""
        return _Memory, (self.flat_D,)


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
        # the memory of torch starts at a cache line; the bits of a product can depend on its place
        self._memory = _Memory(torch.from_numpy(self.layout.pack(self.values)).clone().to(device))
        self.trained = self.layout.trainable  # without the frozen parameters of a rule, see `without`
        self._all_leaves = self.leaves = [trainable[leaf.name] for leaf in self.layout.trainable.leaves]
        self.connect()
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
    def flat_D(self) -> torch.Tensor:  # noqa: N802
        """Return the vector of parameters and buffers."""
        return self._memory.flat_D

    @property
    def lends(self) -> bool:
        """Return whether the model is so large that an update takes its memory, see `lend`."""
        return self.device == "cpu" and self.flat_D.nbytes >= MIN_LENT_BYTES

    def lend(self, start_D: torch.Tensor) -> torch.Tensor:
        """Return the change of the vector since ``start_D``, ``(1, D)``, in the memory of the vector.

        The vector is not the model any more, until a copy into it. While a caller uses the change, `renew` gives the
        model other memory.
        """
        update_1D = self.flat_D.sub_(start_D).numpy()[None]
        self._memory.update = weakref.ref(update_1D)  # each view of the tensor keeps this array
        return torch.from_numpy(update_1D)

    def renew(self) -> None:
        """Take other memory for the vector if a caller uses the result of `lend`. The new vector has no values."""
        if self._memory.update() is None:
            return
        old, size = self.flat_D.numpy(), self.flat_D.nbytes
        memory = np.empty(size + ALIGNMENT, np.uint8)
        start = (old.ctypes.data - memory.ctypes.data) % ALIGNMENT  # the alignment can change the last bit of a result
        self._memory.flat_D = torch.from_numpy(memory[start : start + size].view(old.dtype))
        self._memory.update = lambda: None
        self.connect()

    def connect(self) -> None:
        """Make the parameters and buffers of the module views of the vector."""
        for leaf, parameter in zip(self.layout.trainable.leaves, self._all_leaves, strict=True):
            parameter.data = self.flat_D[self.layout.slices[leaf.name]].view(leaf.shape)
        for name in self.buffers:
            view = self.flat_D[self.layout.slices[name]].view(self.values[name].shape)
            _set_buffer(self.module.inner, name, view.data)

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
        self.renew()
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
