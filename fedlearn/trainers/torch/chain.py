"""Recognize models that are a chain of linear layers, so that their passes need no autograd.

A chain is a `torch.nn.Sequential`, also with others inside. Modules with code of the user are no chains, because such
code may do anything.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fedlearn.trainers.torch.network import Network

DRAWN_SCALE = 0.1  # standard deviation of the parameters in a comparison with autograd


class Activation(NamedTuple):
    """An elementwise function, and the function of its derivative that autograd calls.

    Attributes:
        run: ``(inputs, out=...)``; ``out`` may be the inputs.
        differentiate: ``(gradient, values, grad_input=...)``.
        needs_inputs: whether the derivative follows from the inputs. Otherwise, it follows from the results.
    """

    run: Callable[..., Any]
    differentiate: Callable[..., Any]
    needs_inputs: bool = False


class Link(NamedTuple):
    """A linear layer, and the activations after it."""

    layer: nn.Linear
    activations: tuple[Activation, ...]


_aten = torch.ops.aten


def _relu(inputs: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.relu_(out if out is inputs else out.copy_(inputs))


def _relu_backward(gradient: torch.Tensor, results: torch.Tensor, *, grad_input: torch.Tensor) -> None:
    _aten.threshold_backward.grad_input(gradient, results, 0, grad_input=grad_input)


def _elu(inputs: torch.Tensor, *, out: torch.Tensor) -> None:
    _aten.elu.out(inputs, 1, 1, 1, out=out)


def _elu_backward(gradient: torch.Tensor, inputs: torch.Tensor, *, grad_input: torch.Tensor) -> None:
    _aten.elu_backward.grad_input(gradient, 1, 1, 1, False, inputs, grad_input=grad_input)


_ACTIVATIONS = {
    nn.ReLU: Activation(_relu, _relu_backward),
    nn.ELU: Activation(_elu, _elu_backward, needs_inputs=True),
    nn.Tanh: Activation(torch.tanh, _aten.tanh_backward.grad_input),
    nn.Sigmoid: Activation(torch.sigmoid, _aten.sigmoid_backward.grad_input),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Chain:
    """A model of linear layers and activations in a straight line, each layer once.

    Args:
        network: the model.
        links: its linear layers, with the activations after each.
        flattens: whether the model first flattens each example.
    """

    def __init__(self, network: Network, links: tuple[Link, ...], *, flattens: bool) -> None:
        self.links, self.flattens, self._network = links, flattens, network
        self._parameters = [(layer, dict(layer.named_parameters())) for layer, _ in links]

    @property
    def is_intact(self) -> bool:
        """True if no hook has been added, and nothing has been replaced since the construction."""
        same = _links(self._network.inner) == (self.links, self.flattens)
        hooks = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
        hooks += [getattr(part, name) for part in self._network.modules() for name in _HOOKS]
        patched = any("forward" in vars(part) for part in self._network.modules())
        return same and not any(hooks) and not patched and all(_has_parameters(*item) for item in self._parameters)

    @property
    def num_values(self) -> int:
        """Number of inputs of the model, and of results of its layers."""
        return self.links[0].layer.in_features + sum(layer.out_features for layer, _ in self.links)

    def accepts(self, shape: Sequence[int]) -> bool:
        """Return whether the model accepts an example of this shape."""
        fits = prod(shape) == self.links[0].layer.in_features
        return fits and (len(shape) == 1 or (self.flattens and len(shape) > 1))


def find_chain(network: Network, leaves: Sequence[nn.Parameter]) -> Chain | None:
    """Return the chain of a model, or None if the model is no chain.

    Args:
        network: the model.
        leaves: its trained parameters. All must be in the chain, and the chain may have no others.
    """
    links, flattens = _links(network.inner) if network.is_plain else ((), False)
    parameters = [parameter for layer, _ in links for parameter in layer.parameters()]
    # the strides of a single example of width 1 are ambiguous, and autograd then multiplies in another order
    wide = all(link.layer.in_features > 1 for link in links[1:])
    owned = sorted(map(id, parameters)) == sorted(map(id, leaves)) == sorted(map(id, network.parameters()))
    if not (links and wide and owned):
        return None
    chain = Chain(network, links, flattens=flattens)
    return chain if chain.is_intact else None


def _has_parameters(layer: nn.Linear, parameters: dict[str, nn.Parameter]) -> bool:
    """Return whether a layer is a plain linear layer with these parameters, and all of them train."""
    same = all(layer._parameters.get(name) is parameter for name, parameter in parameters.items())
    plain = all(type(p) is nn.Parameter and p.requires_grad and not p._backward_hooks for p in parameters.values())
    return type(layer) is nn.Linear and same and plain


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a model of `torch.nn.Sequential` runs, in order."""
    if type(module) is not nn.Sequential:
        yield module
        return
    for child in module:
        yield from _parts(child)


def _links(module: nn.Module) -> tuple[tuple[Link, ...], bool]:
    """Return the links of a model, and whether it first flattens its inputs; no links if it is no chain."""
    links: list[Link] = []
    flattens = False
    for part in _parts(module):
        if type(part) is nn.Linear:
            links.append(Link(part, ()))
        elif type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1):
            flattens = flattens or not links
        elif type(part) in _ACTIVATIONS and links and getattr(part, "alpha", 1) == 1:
            layer, activations = links[-1]
            links[-1] = Link(layer, (*activations, _ACTIVATIONS[type(part)]))
        elif type(part) is not nn.Identity:
            return (), False
    return tuple(links), flattens
