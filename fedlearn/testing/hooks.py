"""Check the functions of a local rule that change local steps: penalty, gradient, sent updates, number of steps.

Shapes: K clients, D parameters, B batch with padding, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.batch import Batch, ModelOutputs
from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.testing.comparison import installed_array_libraries, is_close

Vectors = Mapping[str, np.ndarray]
AsLibrary = Callable[[np.ndarray], Any]  # converts a NumPy array to another library
NUM_VALUES, NUM_CLASSES, NUM_EXAMPLES, NUM_PADDING = 5, 4, 6, 3


def check_hooks(rule: LocalRule, rng: np.random.Generator) -> None:
    """Check all hooks of a rule that are set.

    Raises:
        AssertionError: A hook breaks its contract; the message names it.
    """
    names = ("w", "w_global", *rule.client_state, *rule.receives)
    vectors = {name: rng.normal(size=NUM_VALUES).astype(np.float32) for name in names}
    if rule.penalty is not None:
        previous = {"w_previous": rng.normal(size=NUM_VALUES).astype(np.float32)} if rule.previous_model else {}
        _check_penalty(rule, {**vectors, **previous}, rng)
    if rule.gradient is not None:
        _check_gradient(rule.gradient, vectors)
    if rule.send is not None:
        _check_send(rule, rng)
    if rule.num_steps is not None:
        steps = rule.num_steps(1, np.random.default_rng(0))
        assert int(steps) == steps >= 1, f"num_steps must be a whole number >= 1, not {steps!r}"


def _check_penalty(rule: LocalRule, vectors: Vectors, rng: np.random.Generator) -> None:
    x_BF = rng.normal(size=(NUM_EXAMPLES, NUM_VALUES)).astype(np.float32)
    y_B = (np.arange(NUM_EXAMPLES) % NUM_CLASSES).astype(np.int64)
    expected = _penalty(rule, vectors, np.asarray, x_BF, y_B)
    shape = np.shape(expected)
    assert shape in ((), (NUM_EXAMPLES,)), f"a penalty must be one number, or one number per example, not {shape}"
    for value in (0, 1):  # padding may have any values
        padding_BF = np.full((NUM_PADDING, NUM_VALUES), 7 * value, np.float32)
        x, y = np.concatenate([x_BF, padding_BF]), np.concatenate([y_B, np.full(NUM_PADDING, value)])
        padded = np.asarray(_penalty(rule, vectors, np.asarray, x, y))
        same = is_close(padded[:NUM_EXAMPLES] if padded.ndim else padded, expected, 1e-5)
        assert same, "a penalty must not depend on rows of padding: use batch.mean, batch.zero_padding or batch.mask"
    if not rule.couples_examples:
        alone = [_penalty(rule, vectors, np.asarray, x_BF[[i]], y_B[[i]]) for i in range(NUM_EXAMPLES)]
        same = shape == (NUM_EXAMPLES,) and is_close(np.ravel(alone), expected, 1e-5)
        assert same, "the penalty of an example depends on the other examples: set couples_examples=True"
    for as_library in installed_array_libraries():
        same = is_close(_penalty(rule, vectors, as_library, x_BF, y_B), expected, 1e-5)
        assert same, f"a penalty must be the same on {as_library.__module__} arrays"


def _penalty(rule: LocalRule, vectors: Vectors, as_library: AsLibrary, x_BF: np.ndarray, y_B: np.ndarray) -> Any:
    """Return the penalty for a small model without layers; rows after the first ones are padding."""
    x = as_library(x_BF)
    w, w_global, *others = (as_library(v_D) for v_D in vectors.values())

    def run(params_D: Any) -> ModelOutputs:
        features_BF = array_namespace(x).tanh(x * params_D)
        return ModelOutputs(outputs=3 * features_BF[:, :NUM_CLASSES], read_features=lambda: features_BF)

    fields = {"outputs": run(w).outputs, "read_features": run(w).read_features, "targets": as_library(y_B), "run": run}
    batch = Batch(mask=as_library(np.arange(len(x_BF)) < NUM_EXAMPLES), **fields)
    assert rule.penalty is not None
    return rule.penalty(batch, w_global, **dict(zip([*vectors][2:], others, strict=True)))


def _check_gradient(gradient: Callable[..., Any], vectors: Vectors) -> None:
    def value(as_library: AsLibrary) -> Any:
        w, w_global, *others = (as_library(v_D) for v_D in vectors.values())
        slopes = as_library(np.linspace(1, 2, NUM_VALUES, dtype=np.float32))
        return gradient(
            lambda params_D: slopes * params_D, w, w_global, **dict(zip([*vectors][2:], others, strict=True))
        )

    before, expected = {name: v_D.copy() for name, v_D in vectors.items()}, value(np.asarray)
    assert np.shape(expected) == (NUM_VALUES,), "the gradient of a local rule must have the shape of the parameters"
    same = all(np.array_equal(v_D, before[name]) for name, v_D in vectors.items())
    assert same, "the gradient of a local rule must not change its arguments in place"
    for as_library in installed_array_libraries():
        same = is_close(value(as_library), expected, 1e-5)
        assert same, f"the gradient of a local rule must be the same on {as_library.__module__} arrays"


def _check_send(rule: LocalRule, rng: np.random.Generator) -> None:
    assert rule.send is not None
    delta_KD = rng.normal(size=(3, NUM_VALUES)).astype(np.float32)
    state = {name: rng.normal(size=(3, NUM_VALUES)).astype(np.float32) for name in rule.client_state}
    before, expected = delta_KD.copy(), rule.send(delta_KD, **state)
    assert np.shape(expected) == delta_KD.shape, "send must keep the shape of the updates"
    assert np.array_equal(before, delta_KD), "send must not change its arguments in place"
    for as_library in installed_array_libraries():
        values = {name: as_library(v_KD) for name, v_KD in state.items()}
        same = is_close(rule.send(as_library(delta_KD), **values), expected, 1e-5)
        assert same, f"send must be the same on {as_library.__module__} arrays"
