"""Compute the factors of the loss of each class at each client.

Shapes: K clients in a block, C classes.
"""

from __future__ import annotations

import numpy as np

from fedlearn.core.gradient_settings import BALANCED
from fedlearn.core.records import LocalSettings
from fedlearn.errors import require


def class_weights(local: LocalSettings, counts_KC: np.ndarray) -> np.ndarray | None:
    """Return the factor of the loss of each class, ``(K, C)`` float32; None without class weights.

    ``balanced`` gives a class ``n / (c * n_y)``. So all classes of a client count equally, and the mean factor of its
    examples is 1. Classes without examples have the factor 0.

    Args:
        local: settings of local training.
        counts_KC: training examples of each class.

    Raises:
        SettingError: The number of weights differs from the number of classes.
    """
    if local.class_weights is None:
        return None
    if local.class_weights != BALANCED:
        require_weight_per_class(local, counts_KC.shape[1])
        return np.tile(np.array(local.class_weights, np.float32), (len(counts_KC), 1))
    present_K1 = (counts_KC > 0).sum(axis=1, keepdims=True)
    total_K1 = counts_KC.sum(axis=1, keepdims=True)
    weights_KC = total_K1 / (present_K1 * np.maximum(counts_KC, 1))
    return np.where(counts_KC > 0, weights_KC, 0).astype(np.float32)


def require_weight_per_class(local: LocalSettings, num_classes: int) -> None:
    """Check the number of class weights.

    Raises:
        SettingError: The number of weights differs from the number of classes.
    """
    weights = local.class_weights
    fits = weights is None or weights == BALANCED or len(weights) == num_classes
    expected = f"{num_classes} numbers, one per class"
    require(fits, "local.class_weights", weights, expected, "local.class_weights=balanced")
