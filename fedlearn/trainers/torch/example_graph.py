"""Prove that a model keeps the examples of a batch apart, from its graph of operations.

`torch.fx` traces the forward pass. A trace fails if the code depends on values, so a trace is complete. If each
operation keeps example i in row i and reads no other row, the trained model may run on whole batches.

Shapes: B batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

Record = Callable[[str, torch.Tensor, torch.Tensor], None]
CONV = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}  # axes of the inputs with batch
ELEMENTWISE = {
    *(F.relu, F.relu6, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.leaky_relu, F.softplus, F.softsign),
    *(F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.tanhshrink, F.softshrink, F.hardshrink, F.tanh),
    *(F.sigmoid, F.dropout, F.alpha_dropout, torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.abs),
    *(torch.square, torch.sin, torch.cos, operator.neg),
    *("relu", "tanh", "sigmoid", "exp", "abs", "square", "float", "contiguous", "clone"),
}
BINARY = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.iadd,
    operator.imul,
    torch.add,
    torch.mul,
}
POOLS = {
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d), 3),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), 4),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d), 5),
}
ALONG_AXES = {"mean", "sum", "softmax", "log_softmax", torch.mean, torch.sum, F.softmax, F.log_softmax, torch.softmax}


class _Tracer(fx.Tracer):
    """Trace into all modules but the layers with a rule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or "forward" in vars(m)
        return type(m) in LEAVES and not hooked


def separate_graph(module: nn.Module, x_B: torch.Tensor, record: Record) -> fx.GraphModule | None:
    """Return the traced model if its graph proves that no example reads another example, else None.

    Args:
        module: model in training mode.
        x_B: a batch of at least two examples. Later batches must have as many axes.
        record: the traced model calls ``record(name, inputs, output)`` after each layer.
    """
    try:
        traced = fx.GraphModule(module, _Tracer().trace(module))
        checked = _Check(traced)
        checked.run(x_B)
    except Exception:  # a model may contain any code
        return None
    return _with_record(traced, record) if checked.is_separate else None


def _with_record(traced: fx.GraphModule, record: Record) -> fx.GraphModule:
    for n in list(traced.graph.nodes):
        if n.op == "call_module":
            with traced.graph.inserting_after(n):
                traced.graph.call_function(record, (str(n.target), n.args[0], n))
    traced.recompile()
    return traced


class _Check(fx.Interpreter):
    """Run a graph and check each operation against the rules below.

    Attributes:
        is_separate: whether row i of each value is from example i alone.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.is_separate = True
        self.size = -1

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, and note a violation."""
        value = super().run_node(n)
        if n.op == "placeholder":
            self.size = len(value)
        accepted = n.op in ("placeholder", "output") or self._is_accepted(n)
        rows = not isinstance(value, torch.Tensor) or (value.ndim > 1 and len(value) == self.size)
        self.is_separate &= accepted and rows
        return value

    def _is_accepted(self, n: fx.Node) -> bool:
        tensors = [self.env[node] for node in n.all_input_nodes]
        if n.kwargs.get("out") is not None or not tensors:
            return False
        first = tensors[0]
        if n.op == "call_module":
            layer = self.submodules[str(n.target)]
            rule = LEAVES.get(type(layer))
            return rule is not None and len(n.args) == 1 and not n.kwargs and bool(rule(layer, first))
        if n.op not in ("call_function", "call_method"):
            return False
        return _is_shape(n) or _keeps_rows(n, tensors)


def _keeps_rows(n: fx.Node, tensors: list[torch.Tensor]) -> bool:
    """Return whether a function or method reads row i only for row i of its result."""
    target, first = n.target, tensors[0]
    if target in ELEMENTWISE:
        return len(tensors) == 1
    if target in BINARY:  # equal numbers of axes: broadcasting never moves the batch axis
        same = all(isinstance(t, torch.Tensor) and t.ndim == first.ndim for t in tensors)
        return bool(same and not n.kwargs and all(isinstance(a, fx.Node | int | float) for a in n.args))
    if target in POOLS:
        return bool(first.ndim == POOLS[target] and not n.kwargs.get("return_indices"))
    if target in ("flatten", torch.flatten):
        return _argument(n, 1, "start_dim", 0) in range(1, first.ndim)
    if target in ("view", "reshape"):
        return bool(_is_size_of_batch(n.args[1])) and all(isinstance(a, int) for a in n.args[2:])
    if target == "unflatten":
        return _is_inner(n.args[1], first.ndim)
    if target == "permute":
        return bool(n.args[1] == 0) and len(n.args) == first.ndim + 1
    if target in ("transpose", torch.transpose):
        return len(n.args) == 3 and all(_is_inner(axis, first.ndim) for axis in n.args[1:])
    if target in ("unsqueeze", "squeeze"):
        return len(n.args) == 2 and _is_inner(n.args[1], first.ndim + (target == "unsqueeze"))
    if target in ALONG_AXES:
        axes = _argument(n, 1, "dim", None)
        return all(_is_inner(axis, first.ndim) for axis in (axes if isinstance(axes, tuple | list) else (axes,)))
    return False


def _argument(n: fx.Node, place: int, name: str, default: Any) -> Any:
    return n.args[place] if len(n.args) > place else n.kwargs.get(name, default)


def _is_shape(n: fx.Node) -> bool:
    """Return whether an operation reads a shape, and not values."""
    return n.target == "size" or (n.target is getattr and n.args[1:] == ("shape",)) or _is_size_of_batch(n)


def _is_size_of_batch(argument: Any) -> bool:
    """Return whether an argument is the length of axis 0 of a value."""
    if not isinstance(argument, fx.Node) or argument.args[1:] != (0,):
        return False
    shape = argument.args[0]
    if argument.target is not operator.getitem:
        return argument.target == "size"
    return isinstance(shape, fx.Node) and (shape.target == "size" or shape.target is getattr) and shape.args[1:] != (0,)


def _is_inner(axis: Any, ndim: int) -> bool:
    """Return whether an axis is not the batch axis."""
    return isinstance(axis, int) and -ndim < axis < ndim and axis != 0


def _is_image(layer: Any, inputs: torch.Tensor) -> bool:
    return inputs.ndim == CONV[type(layer)]


LEAVES: dict[type[nn.Module], Callable[[Any, torch.Tensor], bool]] = {
    nn.Linear: lambda layer, inputs: inputs.ndim > 1,
    nn.Embedding: lambda layer, inputs: layer.max_norm is None,
    **dict.fromkeys(CONV, _is_image),
    nn.GroupNorm: lambda layer, inputs: inputs.ndim > 1,
    nn.LayerNorm: lambda layer, inputs: inputs.ndim > len(layer.normalized_shape),
}
