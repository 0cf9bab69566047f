"""Judge a regression: counts of residuals and of pairs (target, prediction), as JSON values.

The entries are counts in bins, so they contain no target of a single example.

Shapes: N examples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.data.preprocessing import Target
from fedlearn.runner.evaluation.held_out import HeldOut

NUM_BINS = 24
OUTER_SHARE = 0.005  # share of the examples on each side that count for the outer bins


def regression_entries(held_out: HeldOut, target: Target) -> dict[str, Any]:
    """Return the entries of ``evaluation.json`` on a regression.

    Returns:
        ``residuals`` with the quantiles and a histogram of prediction minus target, and the counts of examples by
        target and prediction. All are in the unit of the target.
    """
    truth_N = target.centre + target.spread * np.asarray(held_out.targets_N, np.float64)
    predicted_N = target.values(held_out.outputs_NC)
    residual_N = predicted_N - truth_N
    edge_E, residual_edge_E = _edges(np.concatenate([truth_N, predicted_N])), _edges(residual_N)
    pairs = np.histogram2d(_inside(truth_N, edge_E), _inside(predicted_N, edge_E), bins=[edge_E, edge_E])[0]
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        "residuals": {
            "mean": float(residual_N.mean()),
            "quantiles": dict(zip(map(str, quantiles), np.quantile(residual_N, quantiles).tolist(), strict=True)),
            "edges": residual_edge_E.tolist(),
            "counts": np.histogram(_inside(residual_N, residual_edge_E), residual_edge_E)[0].tolist(),
            "pair_edges": edge_E.tolist(),
            "pair_counts": pairs.astype(int).tolist(),
        }
    }


def _edges(value_N: np.ndarray) -> np.ndarray:
    """Return edges between the outer quantiles, so that a single example does not determine the scale."""
    low, high = np.quantile(value_N, [OUTER_SHARE, 1 - OUTER_SHARE])
    margin = max(abs(low), 1.0) * 1e-6 if low == high else 0.0
    return np.linspace(low - margin, high + margin, NUM_BINS + 1)


def _inside(value_N: np.ndarray, edge_E: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(value_N, edge_E[0], edge_E[-1]))
