"""Provide a model with a low-rank adapter in NumPy, for tests.

Shapes: D parameters, N examples, F features, C classes, R rank.
"""

from __future__ import annotations

import numpy as np

from fedlearn.core.adapters import LORA_A, LORA_B, LORA_MERGED
from fedlearn.core.layout import Layout
from fedlearn.trainers.base import BaseTrainer

FACTOR_A, FACTOR_B, MERGED = (f"layer{ending}" for ending in (LORA_A, LORA_B, LORA_MERGED))


class AdapterTrainer(BaseTrainer):
    """Classify with ``x (s (M + B A))^T``: an adapter, and a matrix M for merged adapters. B and M start at 0.

    Args:
        num_features: number of features of an example.
        num_classes: number of classes.
        rank: rank of the adapter.
        scale: factor s of the adapter.
        is_mergeable: whether the model has M; otherwise it is 0.
    """

    supports_dp_sgd = True

    def __init__(
        self, num_features: int, num_classes: int, *, rank: int = 2, scale: float = 1.0, is_mergeable: bool = False
    ) -> None:
        self.scale, self._zeros_CF = scale, np.zeros((num_classes, num_features))
        shapes = {FACTOR_A: (rank, num_features), FACTOR_B: (num_classes, rank)}
        merged = {MERGED: (num_classes, num_features)} if is_mergeable else {}
        self.layout = Layout.from_shapes({**shapes, **merged}.items())

    def init(self, seed: int) -> np.ndarray:
        """Return initial parameters: A is in torch's default distribution, and the others are 0."""
        params_D = super().init(seed)
        for name in {FACTOR_B, MERGED} & self.layout.slices.keys():
            params_D[self.layout.slices[name]] = 0
        return params_D

    def product(self, params_D: np.ndarray) -> np.ndarray:
        """Return the matrix of the layer, ``s (M + B A)``, in float64."""
        leaves = {name: leaf.astype(np.float64) for name, leaf in self.layout.unpack(np.asarray(params_D)).items()}
        return self.scale * (leaves.get(MERGED, self._zeros_CF) + leaves[FACTOR_B] @ leaves[FACTOR_A])

    def outputs(self, params_D: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the logits, ``(N, C)``."""
        return np.asarray(x @ self.product(params_D).T)

    def example_gradients(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cross-entropies and their gradients."""
        logits_NC, leaves = self.outputs(params_D, x), self.layout.unpack(np.asarray(params_D))
        shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True, initial=0)
        log_NC = shifted_NC - np.log(np.exp(shifted_NC).sum(axis=1, keepdims=True))
        rows = np.arange(len(y))
        slope_NC = np.exp(log_NC)
        slope_NC[rows, y] -= 1
        slope_NCF = slope_NC[:, :, None] * x[:, None, :]
        gradients = {
            FACTOR_A: self.scale * leaves[FACTOR_B].T @ slope_NCF,
            FACTOR_B: self.scale * slope_NCF @ leaves[FACTOR_A].T,
            MERGED: self.scale * slope_NCF,
        }
        flat = [gradients[leaf.name].reshape(len(x), -1) for leaf in self.layout.leaves]
        return -log_NC[rows, y], np.concatenate(flat, axis=1)
