"""Metrics of consecutive segments of examples, all segments at once: one segment for each client.

Shapes: K segments, N examples, C model outputs or classes.

Sums over a segment do not depend on other segments, so a client that evaluates alone gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedlearn.core.federated_data import Task

RANKING_CUTOFF = 10  # number of top ranks for hr@10 and ndcg@10


class Segments:
    """Divide N examples into K consecutive segments.

    Args:
        sizes_K: number of examples of each segment, >= 1.
    """

    def __init__(self, sizes_K: np.ndarray) -> None:
        self.sizes_K = sizes_K
        self.start_K = np.cumsum(sizes_K) - sizes_K
        self.index_N = np.repeat(np.arange(len(sizes_K)), sizes_K)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of the values ``(N, ...)`` over each segment, ``(K, ...)``."""
        return np.add.reduceat(values, self.start_K, axis=0)

    def mean(self, values_N: np.ndarray) -> np.ndarray:
        """Return the mean of the values over each segment."""
        return np.asarray(self.sum(values_N) / self.sizes_K)

    def confusion(self, targets_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
        """Return the confusion counts (targets x predictions) of each segment, ``(K, C, C)``."""
        cell_N = (self.index_N * num_classes + targets_N) * num_classes + predicted_N
        shape = (len(self.sizes_K), num_classes, num_classes)
        return np.bincount(cell_N, minlength=int(np.prod(shape))).reshape(shape)

    def ranking(self, score_N: np.ndarray) -> Ranking:
        """Return the examples in ascending order of their scores within each segment."""
        order_N = np.argsort(score_N, kind="stable")  # ties in one order, alone and among other segments
        small = len(self.sizes_K) <= np.iinfo(np.uint16).max
        index_N = self.index_N.astype(np.uint16) if small else self.index_N  # NumPy sorts 16-bit integers by radix
        order_N = order_N[np.argsort(index_N[order_N], kind="stable")]
        return Ranking(self, order_N, score_N[order_N])


class Ranking:
    """Hold the order of the examples of each segment by their scores.

    Args:
        segments: the segments.
        order_N: positions of the examples, ascending by segment and by score.
        score_N: scores in this order.
    """

    def __init__(self, segments: Segments, order_N: np.ndarray, score_N: np.ndarray) -> None:
        self.segments, self.order_N = segments, order_N
        is_new_N = np.empty(len(score_N), bool)
        is_new_N[1:] = score_N[1:] != score_N[:-1]
        is_new_N[segments.start_K] = True
        first_T = np.flatnonzero(is_new_N)  # first example of each group of ties
        group_N = np.cumsum(is_new_N) - 1
        self._first_N = first_T[group_N]
        self._last_N = np.append(first_T[1:], len(score_N))[group_N]  # one past the last example of the group

    def roc_auc(self, positive_N: np.ndarray) -> np.ndarray:
        """Return the share of (positive, negative) pairs in the correct order; ties count half (Mann, Whitney, 1947).

        The value of a segment without positives or without negatives is NaN.
        """
        positive_N = positive_N[self.order_N]
        negatives_M = np.concatenate([[0], np.cumsum(~positive_N)])
        twice_below_N = negatives_M[self._first_N] + negatives_M[self._last_N]
        twice_below_N = twice_below_N - 2 * negatives_M[self.segments.start_K][self.segments.index_N]
        count_K = self.segments.sum(positive_N.astype(np.int64))
        mean_K = self.segments.sum(np.where(positive_N, twice_below_N, 0)) / count_K
        return np.asarray(mean_K / (2 * (self.segments.sizes_K - count_K)))

    def average_precision(self, positive_N: np.ndarray) -> np.ndarray:
        """Return the mean over positive examples of the precision at their score; NaN without a positive."""
        positive_N = positive_N[self.order_N]
        positives_M = np.concatenate([[0], np.cumsum(positive_N)])
        end_K = self.segments.start_K + self.segments.sizes_K
        end_N = end_K[self.segments.index_N]
        precision_N = (positives_M[end_N] - positives_M[self._first_N]) / (end_N - self._first_N)
        return np.asarray(
            self.segments.sum(np.where(positive_N, precision_N, 0.0)) / self.segments.sum(positive_N.astype(np.int64))
        )


def segment_metrics(
    outputs_NC: np.ndarray, targets_N: np.ndarray, sizes_K: np.ndarray, task: Task, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Return the metrics of each segment, K values for each name.

    A segment without examples, or with an output that is not finite, has NaN.

    Args:
        outputs_NC: outputs of the model.
        targets_N: targets.
        sizes_K: number of examples of each segment, >= 0.
        task: task of the model.
        names: names of the metrics, in the order of the result.
    """
    outputs_NC, sizes_K = np.asarray(outputs_NC, np.float64), np.asarray(sizes_K, np.int64)
    is_bad_N = ~np.isfinite(outputs_NC).all(axis=tuple(range(1, outputs_NC.ndim)))
    index_N = np.repeat(np.arange(len(sizes_K)), sizes_K)
    is_defined_K = (sizes_K > 0) & (np.bincount(index_N[is_bad_N], minlength=len(sizes_K)) == 0)
    values = {name: np.full(len(sizes_K), np.nan) for name in names}
    if is_defined_K.any():
        kept_N = is_defined_K[index_N]
        segments = Segments(sizes_K[is_defined_K])
        computed = _METRICS[task](segments, outputs_NC[kept_N], np.asarray(targets_N)[kept_N])
        for name in names:
            values[name][is_defined_K] = computed[name]
    return values


def confusion_scores(confusion_KCC: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """Return accuracy, and precision, recall and F1, from confusion counts (targets x predictions).

    For ``binary`` they are the values of class 1. For ``multiclass`` they are means over the classes that occur in
    targets or predictions. A class without predictions (precision) or targets (recall) has the value 0.
    """
    hit_KC = np.diagonal(confusion_KCC, axis1=1, axis2=2)
    target_KC, predicted_KC = confusion_KCC.sum(axis=2), confusion_KCC.sum(axis=1)
    parts = {
        "precision": (hit_KC, predicted_KC),
        "recall": (hit_KC, target_KC),
        "f1": (2 * hit_KC, target_KC + predicted_KC),
    }
    scores = {name: np.where(whole > 0, part / np.maximum(whole, 1), 0.0) for name, (part, whole) in parts.items()}
    if task == "binary":
        averaged = {name: score_KC[:, 1] for name, score_KC in scores.items()}
    else:
        count_K = np.maximum(((target_KC + predicted_KC) > 0).sum(axis=1), 1)
        averaged = {name: score_KC.sum(axis=1) / count_K for name, score_KC in scores.items()}
    return {"accuracy": hit_KC.sum(axis=1) / np.maximum(target_KC.sum(axis=1), 1), **averaged}


def pooled_confusion(outputs_NC: np.ndarray, targets_N: np.ndarray, task: Task) -> np.ndarray | None:
    """Return confusion counts (targets x predictions) of all examples, ``(C, C)``.

    The result is None for other tasks than classification, without examples, and if an output is not finite.
    """
    if task not in ("binary", "multiclass") or not len(targets_N) or not np.isfinite(outputs_NC).all():
        return None
    outputs_NC, num_classes = np.asarray(outputs_NC), max(2, outputs_NC.shape[1])
    predicted_N = outputs_NC[:, 0] > 0 if task == "binary" else outputs_NC.argmax(axis=1)
    targets_N, predicted_N = np.asarray(targets_N).astype(np.int64), predicted_N.astype(np.int64)
    return Segments(np.array([len(targets_N)])).confusion(targets_N, predicted_N, num_classes)[0]


def binary_loss(logit_N: np.ndarray, positive_N: np.ndarray) -> np.ndarray:
    """Return the log loss of each example, in nats."""
    return np.logaddexp(0, np.where(positive_N, -logit_N, logit_N))


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Return log-probabilities that stay distinct near 0, so that confident examples do not tie in a ranking.

    The sum omits its largest term, and log1p adds it.
    """
    shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    others_NC = np.exp(shifted_NC)
    np.put_along_axis(others_NC, logits_NC.argmax(axis=1)[:, None], 0.0, axis=1)
    return shifted_NC - np.log1p(others_NC.sum(axis=1, keepdims=True))


def _binary(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> dict[str, np.ndarray]:
    logit_N, positive_N = outputs_NC[:, 0], targets_N == 1
    ranking = segments.ranking(logit_N)
    confusion_KCC = segments.confusion(positive_N.astype(np.int64), (logit_N > 0).astype(np.int64), 2)
    return {
        "loss": segments.mean(binary_loss(logit_N, positive_N)),
        "auc": ranking.roc_auc(positive_N),
        "auprc": ranking.average_precision(positive_N),
        **confusion_scores(confusion_KCC, "binary"),
    }


def _multiclass(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> dict[str, np.ndarray]:
    targets_N = targets_N.astype(np.int64)  # float if a client without examples is among the clients
    log_p_NC, num_classes = log_softmax(outputs_NC), outputs_NC.shape[1]
    confusion_KCC = segments.confusion(targets_N, outputs_NC.argmax(axis=1), num_classes)
    occurs_KC = confusion_KCC.sum(axis=2) > 0
    area_K = np.zeros(len(segments.sizes_K))
    for label in np.flatnonzero(occurs_KC.any(axis=0)):
        label_area_K = segments.ranking(np.ascontiguousarray(log_p_NC[:, label])).roc_auc(targets_N == label)
        area_K += np.where(occurs_KC[:, label], label_area_K, 0.0)
    scores = confusion_scores(confusion_KCC, "multiclass")
    loss_K = segments.mean(-log_p_NC[np.arange(len(targets_N)), targets_N])
    return {"loss": loss_K, "auc": area_K / occurs_KC.sum(axis=1), **scores}


def _regression(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> dict[str, np.ndarray]:
    targets_N = targets_N.astype(np.float64)
    error_N = targets_N - outputs_NC[:, 0]
    spread_N = targets_N - segments.mean(targets_N)[segments.index_N]
    squared_K, spread_K = segments.sum(error_N**2), segments.sum(spread_N**2)
    range_K = np.maximum.reduceat(targets_N, segments.start_K) - np.minimum.reduceat(targets_N, segments.start_K)
    mse_K = squared_K / segments.sizes_K
    r2_K = np.where((segments.sizes_K >= 2) & (range_K > 0), 1 - squared_K / spread_K, np.nan)
    return {"loss": mse_K, "rmse": np.sqrt(mse_K), "mae": segments.mean(abs(error_N)), "r2": r2_K}


def _ranking(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> dict[str, np.ndarray]:
    score_N, wanted_N = outputs_NC[:, 0], targets_N == 1
    wanted_K = segments.sum(np.where(wanted_N, score_N, 0.0))
    above_N = ~wanted_N & (score_N >= wanted_K[segments.index_N])  # ties count against the wanted example
    rank_K = 1 + segments.sum(above_N.astype(np.int64))
    is_hit_K = np.where(segments.sum(wanted_N.astype(np.int64)) == 1, (rank_K <= RANKING_CUTOFF) * 1.0, np.nan)
    loss_K = segments.mean(binary_loss(score_N, wanted_N))
    return {"loss": loss_K, "hr@10": is_hit_K, "ndcg@10": is_hit_K / np.log2(1 + rank_K)}


_METRICS: Mapping[Task, Callable[[Segments, np.ndarray, np.ndarray], dict[str, np.ndarray]]] = {
    "binary": _binary,
    "multiclass": _multiclass,
    "regression": _regression,
    "ranking": _ranking,
}
