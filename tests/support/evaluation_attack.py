"""Read records out of a node with the evaluations of models that the attacker chooses.

Shapes: N examples, F features.

The model is linear, so its loss on a steep slope is a sum of distances to a plane. The attack moves the plane until one
example is on its positive side. The loss then is the distance of this example. Distances to F + 1 planes are a system
of linear equations for its features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Ask = Callable[[np.ndarray], tuple[float, np.ndarray] | None]  # parameters -> total loss and confusion, or no answer
STEEP = 1e4
FAR = 60.0  # farther than any example


class NoAnswer(Exception):
    """The node does not answer, so the attack ends."""


def recovered_records(ask: Ask, num_features: int, *, num_directions: int = 4, seed: int = 0) -> list[np.ndarray]:
    """Return the records that the attack recovers, each with the features and then the label.

    Args:
        ask: function that evaluates parameters ``(1 + F,)``: first the bias, then the weights.
        num_features: F.
        num_directions: number of directions of the plane.
        seed: seed of the directions.
    """
    rng, records = np.random.default_rng(seed), []
    try:
        for _ in range(num_directions):
            direction_F = rng.normal(size=num_features)
            record = _extreme_record(ask, direction_F / np.linalg.norm(direction_F))
            records += [] if record is None else [record]
    except NoAnswer:
        pass
    return records


def num_correct(records: list[np.ndarray], x: np.ndarray, y: np.ndarray, tolerance: float = 0.05) -> int:
    """Return the number of distinct true examples among the recovered records."""
    truth = np.concatenate([x, y[:, None]], axis=1)
    distances = [np.abs(truth - record).max(axis=1) for record in records]
    return len({int(distance.argmin()) for distance in distances if distance.min() < tolerance})


def _extreme_record(ask: Ask, direction_F: np.ndarray) -> np.ndarray | None:
    """Return the example that is farthest in a direction."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        count, _, _ = _above(ask, direction_F, middle)
        if count == 1:
            break
        low, high = (middle, high) if count > 1 else (low, middle)
    else:
        return None
    _, label, first = _above(ask, direction_F, middle)
    step, rows, values = 0.02, [direction_F], [first]
    for feature in range(len(direction_F)):
        moved_F = direction_F + step * np.eye(len(direction_F))[feature]
        rows.append(moved_F)
        values.append(_above(ask, moved_F, middle)[2])
    return np.append(np.linalg.lstsq(np.array(rows), np.array(values) + middle, rcond=None)[0], label)


def _above(ask: Ask, direction_F: np.ndarray, threshold: float) -> tuple[int, int, float]:
    """Return the number of examples above a plane, the label of the first, and the sum of their distances."""
    model = STEEP * np.concatenate([[-threshold], direction_F])
    loss, confusion = _ask(ask, model)
    count, label = int(confusion[:, 1].sum()), int(confusion[1, 1] > 0)
    # loss = sum over negatives of max(0, m) + sum over positives of max(0, -m)
    far = STEEP * np.concatenate([[-threshold - FAR], direction_F])
    far_loss, far_confusion = _ask(ask, far)
    num_positive = far_confusion[1].sum()
    positives = far_loss - STEEP * FAR * num_positive  # sum over positives of -m
    current = loss - positives  # a negative example above adds m; a positive example above adds m, as its -m is missing
    return count, label, float(current / STEEP)


def _ask(ask: Ask, model: np.ndarray) -> tuple[float, np.ndarray]:
    answer = ask(model.astype(np.float32))
    if answer is None:
        raise NoAnswer
    return answer
