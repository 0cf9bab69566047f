"""Check that a model and its loss keep the examples of a batch apart, for every framework.

DP-SGD protects an example only if its gradient depends on no other example. The check runs a few examples alone and
in batches of two sizes. Outputs, losses and gradients must agree.

Shapes: N examples, B batch, C outputs, D parameters, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fedlearn.core.arrays import holds_whole_numbers
from fedlearn.core.inputs import input_arrays, map_fields
from fedlearn.core.records import Examples
from fedlearn.errors import SettingError

BATCHES = (slice(0, 2), slice(2, 5))  # two sizes, so a layer with T equal to one size differs at the other size
NUM_EXAMPLES = 5
LARGE = 30.0  # factor for inputs that a model mixes only if they are large
TOLERANCE = 1e-3  # relative to the largest value; rounding errors are far below


class Evaluated(NamedTuple):
    """Results of one batch.

    Attributes:
        outputs_BC: outputs of the model, ``(B, ...)``.
        loss_B: loss of each example, ``(B,)``.
        gradient_D: gradient of the sum of the losses; None if it was not computed.
    """

    outputs_BC: np.ndarray
    loss_B: np.ndarray
    gradient_D: np.ndarray | None = None


Evaluate = Callable[[np.ndarray, np.ndarray], Evaluated]  # (x_B, y_B) -> results of the batch


def probe_examples(examples: Examples, *, synthetic: bool, seed: int = 1) -> Iterator[Examples]:
    """Yield groups of five examples for the check: examples as they are, large inputs, and shorter sequences.

    Args:
        examples: examples of a client, N >= 1.
        synthetic: whether inputs are drawn at random, in the range of the client's data. Real clients need this,
            because a refusal must not depend on their data.
        seed: seed of the random inputs.
    """
    rng = np.random.default_rng(seed)
    x_N, y_N = np.asarray(examples.x), np.asarray(examples.y)
    rows = rng.choice(len(examples), NUM_EXAMPLES, replace=len(examples) < NUM_EXAMPLES)
    x, y = finite_inputs(x_N[rows]), y_N[rows]
    if synthetic:
        x = map_fields(lambda part, part_N: _in_range(part_N, rng, are_codes=holds_whole_numbers(part)), x, x_N)
    yield Examples(x, y)
    other = map_fields(lambda part, part_N: _other_values(part, part_N, rng), x, x_N)
    # equal labels, because a loss can count the labels of a batch
    yield Examples(other, np.repeat(y[:1], NUM_EXAMPLES, axis=0))
    parts = [part for part in input_arrays(x) if part.ndim > 1]
    lengths = {part.shape[1] for part in parts}
    if len(lengths) == 1 and max(lengths) > 2:
        cut = map_fields(lambda part: np.ascontiguousarray(part[:, :-1]) if part.ndim > 1 else part, x)
        yield Examples(cut, y)  # refused by most models without sequences


def finite_inputs(x: np.ndarray) -> np.ndarray:
    """Return inputs with zeros in place of NaN and infinity."""
    return map_fields(lambda part: np.nan_to_num(part, posinf=0, neginf=0), x)


def _other_values(x: np.ndarray, x_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return large random inputs, or other codes in the range of the client's data."""
    if holds_whole_numbers(x):
        return _in_range(x_N, rng, are_codes=True)
    return rng.normal(0, LARGE * max(1.0, float(np.abs(x).mean())), x.shape).astype(x.dtype)


def _in_range(x_N: np.ndarray, rng: np.random.Generator, *, are_codes: bool) -> np.ndarray:
    """Return random inputs in the range of each input, because a model can use inputs as row numbers of a table.

    Codes have no negative numbers, if others are possible.
    """
    finite = np.nan_to_num(x_N, posinf=0, neginf=0)
    low, high = finite.min(axis=0), finite.max(axis=0)
    shape = (NUM_EXAMPLES, *x_N.shape[1:])
    if are_codes:
        low = np.where(high >= 0, np.maximum(low, 0), low)  # -1 or -100 marks padding: the numbers between are no codes
        return rng.integers(low.astype(np.int64), high.astype(np.int64) + 1, shape).astype(x_N.dtype)
    return rng.uniform(low, high, shape).astype(x_N.dtype)


def find_mixing(evaluate: Evaluate, examples: Examples, *, tolerance: float = TOLERANCE) -> str:
    """Return ``outputs``, ``losses`` or ``gradients`` if they differ between batches and single examples, or "".

    Args:
        evaluate: ``(x_B, y_B) -> Evaluated``, in training mode. Random draws must not depend on the batch.
        examples: five examples.
        tolerance: largest accepted difference, relative to the largest value.
    """
    alone = [evaluate(examples.x[n : n + 1], examples.y[n : n + 1]) for n in range(NUM_EXAMPLES)]
    for rows in BATCHES:
        batch, parts = evaluate(examples.x[rows], examples.y[rows]), alone[rows]
        for name, together, apart in (
            ("outputs", batch.outputs_BC, np.concatenate([part.outputs_BC for part in parts])),
            ("losses", batch.loss_B, np.concatenate([np.atleast_1d(part.loss_B) for part in parts])),
        ):
            if not agree(together, apart, tolerance):
                return name
        gradients = [part.gradient_D for part in parts if part.gradient_D is not None]
        if batch.gradient_D is not None and gradients:
            scale = max(float(np.abs(gradient_D).max(initial=0)) for gradient_D in gradients)
            if not agree(batch.gradient_D, np.sum(gradients, axis=0), tolerance, scale=scale):
                return "gradients"
    return ""


def agree(values: np.ndarray, others: np.ndarray, tolerance: float = TOLERANCE, *, scale: float = 0.0) -> bool:
    """Return whether two arrays have the same shape and nearly equal values. Values that are not finite are skipped.

    Args:
        values: array.
        others: array.
        tolerance: largest accepted difference, relative to ``scale`` and to the largest value.
        scale: see ``tolerance``.
    """
    if values.shape != others.shape:
        return False
    finite = np.isfinite(values) & np.isfinite(others)
    values, others = values[finite].astype(np.float64), others[finite].astype(np.float64)
    scale = max(scale, float(np.abs(values).max(initial=0)), float(np.abs(others).max(initial=0)))
    return bool(np.abs(values - others).max(initial=0) <= tolerance * scale)


def refuse(reason: str) -> SettingError:
    """Return the error for a model that DP-SGD cannot protect.

    Args:
        reason: part of the model and its fault, e.g. ``norm (BatchNorm1d) mixes the examples of a batch``.
    """
    expected = f"another setting, or a model that treats each example alone: {reason}"
    return SettingError("privacy", "example", expected, "privacy=central")
