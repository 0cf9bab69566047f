"""Define the task ``ranking``: the held-out part of a client is one list with one wanted example.

Shapes: K segments, N examples, C outputs.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedlearn.core.metric import Metric, Sums
from fedlearn.core.segments import Segments
from fedlearn.core.tasks.base import Task
from fedlearn.core.tasks.classification import binary_loss, class_targets, mean_loss

CUTOFF = 10  # number of top ranks for hr@10 and ndcg@10


def _loss_sums(outputs_NC: np.ndarray, targets_N: np.ndarray) -> Sums:
    return {"loss": binary_loss(outputs_NC[:, 0], targets_N == 1)}


def _rank(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of the wanted example of each list, and the hit: 1 or 0, NaN without one wanted example."""
    score_N, wanted_N = outputs_NC[:, 0], targets_N == 1
    wanted_K = segments.sum(np.where(wanted_N, score_N, 0.0))
    above_N = ~wanted_N & (score_N >= wanted_K[segments.index_N])  # ties count against the wanted example
    rank_K = 1 + segments.sum(above_N.astype(np.int64))
    return rank_K, np.where(segments.sum(wanted_N.astype(np.int64)) == 1, (rank_K <= CUTOFF) * 1.0, np.nan)


def _hit_rate(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    return _rank(segments, outputs_NC, targets_N)[1]


def _gain(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    rank_K, is_hit_K = _rank(segments, outputs_NC, targets_N)
    return np.asarray(is_hit_K / np.log2(1 + rank_K))


RANKING = Task(
    name="ranking",
    metrics=(
        Metric(name="loss", sums=_loss_sums, finish=mean_loss, higher_is_better=False),
        Metric(name="hr@10", whole=_hit_rate),
        Metric(name="ndcg@10", whole=_gain),
    ),
    main_metric="hr@10",
    targets=partial(class_targets, task="ranking", num_classes=2),
    count_classes=lambda y: 2,
    has_classes=True,
    averages_lists=True,
)
