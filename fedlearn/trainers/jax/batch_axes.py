"""Prove that a program keeps the examples of a batch apart, from its operations and without running it.

The proof follows the axis of the examples through the operations of a traced program (a jaxpr). No operation may
reduce, reorder or merge this axis. Numbers in the program must not depend on its length. The proof knows the operations
of common layers and losses; it fails for other operations, and for user-defined backward passes.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

LENGTHS = (1009, 1013)  # primes, which are no size of another axis
# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le",
    "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
)
# fmt: on
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "closed_call": "call_jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr"}  # functions such as relu

Axis = int | None  # axis of the examples; None if an array does not depend on examples
Axes = Sequence[Axis]


class _NotProven(Exception):
    """Stop a proof at an operation that it does not know, or that may mix examples."""


def has_separate_examples(run: Callable[..., Any], example: Sequence[Any], *others: Any) -> bool:
    """Return whether each output of an example provably depends on no other example, and not on their number.

    Args:
        run: ``(*batch, *others)`` -> outputs whose first axis is the batch.
        example: arrays, or mappings and tuples of arrays, of one example, without batch axis.
        others: arrays that do not depend on examples, e.g. parameters and keys.
    """
    programs = []
    for length in LENGTHS:
        batch = jax.tree.map(partial(_batch_of, length), tuple(example))
        program = jax.make_jaxpr(run)(*batch, *others)
        num_parts = len(jax.tree.leaves(batch))
        try:
            axes = _Proof(length).follow(
                program.jaxpr, [0] * num_parts + [None] * (len(program.jaxpr.invars) - num_parts)
            )
        except _NotProven:
            return False
        if any(axis != 0 for axis in axes):
            return False
        programs.append(_numbers(program.jaxpr) + list(program.consts))
    return len(programs[0]) == len(programs[1]) and all(map(_is_equal, *programs))


def _batch_of(length: int, part: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((length, *np.shape(part)), jnp.asarray(part).dtype)


class _Proof:
    """Follow the axis of the examples, which has ``length`` entries."""

    def __init__(self, length: int) -> None:
        self.length = length

    def follow(self, jaxpr: Any, axes: Sequence[Axis]) -> list[Axis]:
        """Return the axes of the outputs of a program from the axes of its inputs."""
        known: dict[Any, Axis] = dict(zip(jaxpr.invars, axes, strict=True))
        known |= dict.fromkeys(jaxpr.constvars)
        if any(size % self.length == 0 and size > 0 for var in jaxpr.constvars for size in var.aval.shape):
            raise _NotProven

        def axis_of(var: Any) -> Axis:
            return None if isinstance(var, Literal) else known[var]

        for eqn in jaxpr.eqns:
            inputs = [axis_of(var) for var in eqn.invars]
            outputs = self._outputs(eqn, inputs)
            for var, axis in zip(eqn.outvars, outputs, strict=True):
                shape = var.aval.shape
                if [size % self.length == 0 and size > 0 for size in shape] != [i == axis for i in range(len(shape))]:
                    raise _NotProven
                known[var] = axis
        return [axis_of(var) for var in jaxpr.outvars]

    def _outputs(self, eqn: Any, axes: list[Axis]) -> list[Axis]:
        """Return the axes of the outputs of one operation."""
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            inner = params[CALLS[name]]
            return self.follow(getattr(inner, "jaxpr", inner), axes)
        if name == "scan":
            return self._scan(params, axes)
        if all(axis is None for axis in axes):
            return [self._created(eqn, var) for var in eqn.outvars]
        rule = RULES.get(name)
        if rule is None:
            raise _NotProven
        return [rule(eqn, axes)] * len(eqn.outvars)

    def _created(self, eqn: Any, var: Any) -> Axis:
        """Return the axis of an array that does not depend on examples, but may have an entry for each."""
        places = [i for i, size in enumerate(var.aval.shape) if size == self.length]
        if not places:
            return None
        same = eqn.primitive.name == "broadcast_in_dim" and places[0] not in eqn.params["broadcast_dimensions"]
        other_iota = eqn.primitive.name == "iota" and eqn.params["dimension"] != places[0]
        if len(places) > 1 or not (same or other_iota or eqn.primitive.name == "random_bits"):
            raise _NotProven
        return places[0]

    def _scan(self, params: Any, axes: list[Axis]) -> list[Axis]:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts, carry = axes[:num_consts], axes[num_consts : num_consts + num_carry]
        stacked = axes[num_consts + num_carry :]
        if 0 in stacked:
            raise _NotProven
        inputs = [axis if axis is None else axis - 1 for axis in stacked]
        for _ in range(2):
            outputs = self.follow(params["jaxpr"].jaxpr, [*consts, *carry, *inputs])
            if outputs[:num_carry] == carry:
                return [*carry, *(axis if axis is None else axis + 1 for axis in outputs[num_carry:])]
            carry = outputs[:num_carry]
        raise _NotProven


def _common(axes: Axes) -> int:
    found = {axis for axis in axes if axis is not None}
    if len(found) != 1:
        raise _NotProven
    return found.pop()


def _only_first(axes: Axes) -> int:
    """Return the axis of the first operand. The other operands must not depend on examples."""
    if axes[0] is None or any(axis is not None for axis in axes[1:]):
        raise _NotProven
    return axes[0]


def _broadcast_in_dim(eqn: Any, axes: Axes) -> Axis:
    return int(eqn.params["broadcast_dimensions"][_only_first(axes)])


def _reshape(eqn: Any, axes: Axes) -> Axis:
    axis, before, after = _only_first(axes), eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is None:
        for place, size in enumerate(after):
            if size == before[axis] and prod(after[:place]) == prod(before[:axis]):
                return place
    raise _NotProven


def _squeeze(eqn: Any, axes: Axes) -> Axis:
    return _reduce(eqn, axes, "dimensions")


def _reduce(eqn: Any, axes: Axes, key: str = "axes") -> Axis:
    axis, removed = _only_first(axes), eqn.params[key]
    if axis in removed:
        raise _NotProven
    return int(axis - sum(other < axis for other in removed))


def _transpose(eqn: Any, axes: Axes) -> Axis:
    return list(eqn.params["permutation"]).index(_only_first(axes))


def _along_axis(eqn: Any, axes: Axes) -> Axis:
    axis, params = _common(axes), eqn.params
    moved = [params[key] for key in ("axis", "dimension", "dimensions") if key in params]
    if not moved or axis in np.ravel(moved):
        raise _NotProven
    return axis


def _pad(eqn: Any, axes: Axes) -> Axis:
    axis = _only_first(axes)
    return axis if tuple(eqn.params["padding_config"][axis]) == (0, 0, 0) else _fail()


def _slice(eqn: Any, axes: Axes) -> Axis:
    return _only_first(axes)  # the length of the axis stays, so it is not cut


def _window(eqn: Any, axes: Axes) -> Axis:
    axis, params = _only_first(axes), eqn.params
    window = params["window_dimensions"][axis], params["window_strides"][axis], *params["padding"][axis]
    return axis if window == (1, 1, 0, 0) else _fail()


def _dot_general(eqn: Any, axes: Axes) -> Axis:
    contracting, batch = eqn.params["dimension_numbers"]
    sides = range(2)
    if any(axes[side] in contracting[side] for side in sides if axes[side] is not None):
        raise _NotProven
    paired = [axes[side] is not None and axes[side] in batch[side] for side in sides]
    if all(paired):
        places = {list(batch[side]).index(axes[side]) for side in sides}
        return places.pop() if len(places) == 1 else _fail()
    if any(paired) or None not in axes:
        raise _NotProven
    side = 0 if axes[0] is not None else 1
    free = [[i for i in range(v.aval.ndim) if i not in (*contracting[s], *batch[s])] for s, v in enumerate(eqn.invars)]
    return len(batch[0]) + (len(free[0]) if side else 0) + free[side].index(_common(axes))


def _conv_general_dilated(eqn: Any, axes: Axes) -> Axis:
    axis, numbers = _only_first(axes), eqn.params["dimension_numbers"]
    if axis != numbers.lhs_spec[0] or eqn.params["batch_group_count"] != 1:
        raise _NotProven
    return int(numbers.out_spec[0])


def _gather(eqn: Any, axes: Axes) -> Axis:
    numbers, (operand, index) = eqn.params["dimension_numbers"], axes[:2]
    others = [i for i in range(eqn.outvars[0].aval.ndim) if i not in numbers.offset_dims]
    if operand is None and index is not None:
        return others[index] if index < len(others) else _fail()
    if operand is not None and index is None:
        hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        shown = [i for i in range(eqn.invars[0].aval.ndim) if i not in hidden]
        if operand in numbers.start_index_map or operand not in shown:
            raise _NotProven
        return int(numbers.offset_dims[shown.index(operand)])
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    return others[index] if index is not None and (operand, index) in list(pairs) else _fail()


def _fail() -> Axis:
    raise _NotProven


def _elementwise(eqn: Any, axes: Axes) -> Axis:
    return _common(axes)


RULES: dict[str, Callable[[Any, Axes], Axis]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along_axis),
    **dict.fromkeys(("sort", "rev", "concatenate", "split"), _along_axis),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    **dict.fromkeys(("slice", "dynamic_slice"), _slice),
    "broadcast_in_dim": _broadcast_in_dim,
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
}


def _numbers(jaxpr: Any) -> list[np.ndarray]:
    """Return all numbers in a program."""
    numbers = []
    for eqn in jaxpr.eqns:
        numbers += [np.asarray(var.val) for var in eqn.invars if isinstance(var, Literal)]
        inner = [eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params]
        for program in inner:
            numbers += _numbers(getattr(program, "jaxpr", program)) + list(getattr(program, "consts", ()))
    return numbers + [np.asarray(var.val) for var in jaxpr.outvars if isinstance(var, Literal)]


def _is_equal(number: Any, other: Any) -> bool:
    try:
        return number is other or np.array_equal(np.asarray(number), np.asarray(other))
    except TypeError:  # keys of random numbers
        return False


def uses(function: Callable[..., Any], argument: Any, *others: Any) -> bool:
    """Return whether the result of ``function(argument, *others)`` may depend on its first argument."""
    jaxpr = jax.make_jaxpr(function)(argument, *others).jaxpr
    live = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if any(var in live for var in eqn.outvars):
            live |= {var for var in eqn.invars if not isinstance(var, Literal)}
    return any(var in live for var in jaxpr.invars[: len(jax.tree.leaves(argument))])
