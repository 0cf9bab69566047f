"""Recognize models that are a chain of linear layers, so that their passes need no autograd.

`torch.fx` traces the forward pass, and each operation must be a known link of a straight line. A trace shows a single
run of the code. So the code must be simple too: it may only call layers and activations, without conditions.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dis import get_instructions
from functools import partial
from inspect import CO_VARARGS, CO_VARKEYWORDS
from math import prod
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules import module as torch_module

from fedlearn.trainers.torch.network import Network

Write = Callable[..., Any]  # writes its result into an argument


class Activation(NamedTuple):
    """An elementwise function, and the function of its derivative that autograd calls.

    Attributes:
        run: ``(inputs, out=...)``.
        differentiate: ``(gradient, values, grad_input=...)``.
        needs_inputs: whether the derivative follows from the inputs. Otherwise, it follows from the results.
    """

    run: Write
    differentiate: Write
    needs_inputs: bool = False


class Link(NamedTuple):
    """A linear layer, and the activations after it."""

    layer: nn.Linear
    activations: tuple[Activation, ...]


_aten = torch.ops.aten
_NAMES = ("relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu")
_MODULES = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.GELU: "gelu", nn.SiLU: "silu"}
_MODULES |= {nn.ELU: "elu", nn.LeakyReLU: "leaky_relu"}
_FUNCTIONS: dict[Any, str] = {name: name for name in ("relu", "tanh", "sigmoid", "flatten")}
_FUNCTIONS |= {function: name for name in _NAMES if (function := getattr(F, name, None)) is not None}
_FUNCTIONS |= {torch.relu: "relu", torch.tanh: "tanh", torch.sigmoid: "sigmoid", torch.flatten: "flatten"}
_LEAVES = (nn.Linear, nn.Flatten, nn.Identity, *_MODULES)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# a class may define these names of `nn.Module`, and no others
_DEFINED_NAMES = {"__init__", "forward", "extra_repr", "__module__", "__doc__", "__annotations__", "__annotate__"}
_DEFINED_NAMES |= {"__qualname__", "__firstlineno__", "__static_attributes__", "__annotate_func__"}
# names in the code of a forward pass, besides the names of its layers and numbers
_USED_NAMES = {*_NAMES, "flatten", "functional", "nn", "get_submodule"}
_USED_VALUES = (torch, nn, F, range, len, enumerate, zip, reversed, *(f for f in _FUNCTIONS if callable(f)))
# conditions, changes of state, and functions inside of functions
_FORBIDDEN = ("JUMP_IF", "STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "DELETE_", "IMPORT_", "WITH", "YIELD", "MAKE_")


class Chain:
    """A model of linear layers and activations in a straight line, each layer once.

    Args:
        network: the model.
        links: its layers, in order.
        flattens: whether the model first flattens each example.
    """

    def __init__(self, network: Network, links: Sequence[Link], *, flattens: bool) -> None:
        self.links, self.flattens = tuple(links), flattens
        parts = [*network.modules()]
        parts = [*network.modules()]
        self._hooks = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
        self._hooks += [getattr(part, name) for part in parts for name in _HOOKS]
        self._code = [(part, type(part), type(part).forward) for part in parts]
        self._modules = [(part._modules, dict(part._modules)) for part in parts]
        self._values = [(vars(part), *item) for part in parts for item in vars(part).items() if _is_setting(item[1])]
        self._values += [(layer._parameters, *item) for layer, _ in links for item in layer.named_parameters()]
        self._trained = [parameter for layer, _ in links for parameter in layer.parameters()]

    @property
    def is_intact(self) -> bool:
        """True if no hook has been added, and no part of the model has been replaced since the construction."""
        if any(self._hooks) or any(now != then for now, then in self._modules):
            return False
        if any("forward" in vars(part) or type(part) is not k or k.forward is not f for part, k, f in self._code):
            return False
        plain = all(type(p) is nn.Parameter and p.requires_grad and not p._backward_hooks for p in self._trained)
        return plain and all(place.get(name) is value for place, name, value in self._values)

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
    try:
        links, flattens = _links(network.inner) if network.is_plain else ([], False)
    except Exception:  # a model may contain any code
        return None
    parameters = [parameter for layer, _ in links for parameter in layer.parameters()]
    # the strides of a single example of width 1 are ambiguous, and autograd then multiplies in another order
    wide = all(link.layer.in_features > 1 for link in links[1:])
    owned = sorted(map(id, parameters)) == sorted(map(id, leaves)) == sorted(map(id, network.parameters()))
    if not (links and wide and owned) or [*network.buffers()]:
        return None
    chain = Chain(network, links, flattens=flattens)
    return chain if chain.is_intact else None


def _is_setting(value: Any) -> bool:
    """Return whether an attribute of a module can be a setting of its forward pass."""
    return type(value) in (int, float, str) or callable(value)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _LEAVES


def _links(module: nn.Module) -> tuple[list[Link], bool]:
    """Return the links of a model, and whether it first flattens its inputs; no links if it is no chain."""
    root = nn.Sequential(module) if type(module) in _LEAVES else module
    if not all(map(_has_simple_code, root.modules())):
        return [], False
    last, *nodes = _Tracer().trace(root).nodes
    links: list[Link] = []
    flattens = False
    if last.op != "placeholder" or nodes[-1].op != "output":
        return [], False
    for node in nodes:
        is_next = node.args[:1] == (last,) and node.all_input_nodes == [last] and list(last.users) == [node]
        if not is_next:
            return [], False
        if node.op == "output":
            return links, flattens
        part = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if part is not None and (len(node.args) != 1 or node.kwargs):
            return [], False
        if type(part) is nn.Linear:
            links.append(Link(part, ()))
        elif type(part) is nn.Flatten or _FUNCTIONS.get(node.target) == "flatten":
            first, end = (part.start_dim, part.end_dim) if part is not None else _axes(node)
            if (first, end) != (1, -1):
                return [], False
            flattens = flattens or not links
        elif type(part) is not nn.Identity:
            activation = _activation(node, part)
            if activation is None or not links:
                return [], False
            links[-1] = Link(links[-1].layer, (*links[-1].activations, activation))
        last = node
    return [], False


def _axes(node: fx.Node) -> tuple[Any, Any]:
    """Return the first and the last axis that a call flattens."""
    values = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return values.get("start_dim", 0), values.get("end_dim", -1)


def _activation(node: fx.Node, part: nn.Module | None) -> Activation | None:
    """Return the activation of a call; None if it is unknown."""
    if part is None and (node.op not in ("call_function", "call_method") or len(node.args) != 1):
        return None
    name = _FUNCTIONS.get(node.target) if part is None else _MODULES.get(type(part))
    values: dict[str, Any] = dict(node.kwargs) if part is None else vars(part)
    if name != "relu" and values.get("inplace"):  # autograd then differentiates from the results
        return None
    if name in ("relu", "tanh", "sigmoid"):
        differentiate = _relu_backward if name == "relu" else getattr(_aten, f"{name}_backward").grad_input
        return Activation(_relu if name == "relu" else getattr(torch, name), differentiate)
    if name == "silu":
        return Activation(_aten.silu.out, _aten.silu_backward.grad_input, needs_inputs=True)
    if name == "gelu":
        kind = values.get("approximate", "none")
        return Activation(partial(_gelu, kind), partial(_gelu_backward, kind), needs_inputs=True)
    if name == "leaky_relu":
        slope = values.get("negative_slope", 0.01)
        return Activation(partial(_leaky_relu, slope), partial(_leaky_relu_backward, slope), needs_inputs=True)
    if name == "elu":
        alpha = values.get("alpha", 1.0)
        return Activation(partial(_elu, alpha), partial(_elu_backward, alpha), needs_inputs=True)
    return None


def _relu(inputs: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.relu_(out if out is inputs else out.copy_(inputs))


def _relu_backward(gradient: torch.Tensor, results: torch.Tensor, *, grad_input: torch.Tensor) -> None:
    _aten.threshold_backward.grad_input(gradient, results, 0, grad_input=grad_input)


def _gelu(kind: str, inputs: torch.Tensor, *, out: torch.Tensor) -> None:
    for inputs_k, out_k in zip(inputs, out, strict=True):  # torch has other code for memory with gaps
        _aten.gelu.out(inputs_k, approximate=kind, out=out_k)


def _gelu_backward(kind: str, gradient: torch.Tensor, inputs: torch.Tensor, *, grad_input: torch.Tensor) -> None:
    for gradient_k, inputs_k, grad_input_k in zip(gradient, inputs, grad_input, strict=True):
        _aten.gelu_backward.grad_input(gradient_k, inputs_k, approximate=kind, grad_input=grad_input_k)


def _leaky_relu(slope: float, inputs: torch.Tensor, *, out: torch.Tensor) -> None:
    _aten.leaky_relu.out(inputs, slope, out=out)


def _leaky_relu_backward(slope: float, gradient: torch.Tensor, inputs: torch.Tensor, **out: Any) -> None:
    _aten.leaky_relu_backward.grad_input(gradient, inputs, slope, False, **out)


def _elu(alpha: float, inputs: torch.Tensor, *, out: torch.Tensor) -> None:
    _aten.elu.out(inputs, alpha, 1, 1, out=out)


def _elu_backward(alpha: float, gradient: torch.Tensor, inputs: torch.Tensor, **out: Any) -> None:
    _aten.elu_backward.grad_input(gradient, alpha, 1, 1, False, inputs, **out)


def _has_simple_code(module: nn.Module) -> bool:
    """Return whether the code of a module can only call layers and activations, always the same ones."""
    kind = type(module)
    if kind in (*_LEAVES, nn.Sequential, nn.ModuleList):
        return True
    defined = {name for parent in kind.__mro__ if not parent.__module__.startswith("torch.") for name in vars(parent)}
    replaced = {name for name in defined - vars(object).keys() if hasattr(nn.Module, name) or name.startswith("__")}
    code = getattr(kind.forward, "__code__", None)
    if replaced - _DEFINED_NAMES or not isinstance(kind.forward, FunctionType) or code is None or code.co_freevars:
        return False
    if code.co_argcount != 2 or code.co_kwonlyargcount or code.co_flags & (CO_VARARGS | CO_VARKEYWORDS):
        return False  # the default of another argument could be any function
    if any(word in step.opname for step in get_instructions(code) for word in _FORBIDDEN):
        return False
    return all(_is_simple_name(module, name, kind.forward.__globals__) for name in code.co_names)


def _is_simple_name(module: nn.Module, name: str, variables: dict[str, Any]) -> bool:
    """Return whether a name in a forward pass is a layer, an activation or a number, wherever it is looked up."""
    builtins = {function.__name__: function for function in (range, len, enumerate, zip, reversed)}
    values = [place[name] for place in (variables, vars(module)) if name in place]
    if getattr(type(module), name, None) is not getattr(nn.Module, name, None):
        return False  # a method, a property or a constant of the class
    plain = all(any(value is used for used in _USED_VALUES) or type(value) in (int, float, str) for value in values)
    return plain and bool(values or name in _USED_NAMES or name in module._modules or name in builtins)
