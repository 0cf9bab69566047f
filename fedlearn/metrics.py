"""What a model is worth on held-out examples, pooled and client by client.

Shapes: K clients, N examples, C model outputs.

Metrics are scikit-learn's, imported at the first evaluation because that takes more than a second. Two are not: the
loss comes straight from the logits, where a probability would already have been rounded to 0 or 1; and a single
client's AUC is counted here, because ``roc_auc_score`` takes a millisecond a class whatever the size (7 s for 100
clients and 62 classes). The tests hold both equal to scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from fedlearn.data.federated import Task
from fedlearn.records import Evaluation, Predictions

METRICS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {
        "binary": ("loss", "accuracy", "auc", "precision", "recall", "f1"),
        "multiclass": ("loss", "accuracy", "auc", "precision", "recall", "f1"),
        "regression": ("loss", "rmse", "mae", "r2"),
    }
)
Auc = Callable[[np.ndarray, np.ndarray], float]  # (positive_N, score_N) -> area under the ROC curve, NaN if undefined
_LOWER_IS_BETTER = frozenset({"loss", "rmse", "mae"})


def main_metric(task: Task) -> str:
    """The metric that tables and figures lead with: ``accuracy``, or ``rmse`` for regression."""
    return "rmse" if task == "regression" else "accuracy"


def higher_is_better(metric: str) -> bool:
    """False for losses and errors, True for all others.

    >>> higher_is_better("accuracy"), higher_is_better("rmse")
    (True, False)
    """
    return metric not in _LOWER_IS_BETTER


def evaluate(predictions: Sequence[Predictions], *, task: Task, pooled: Predictions | None = None) -> Evaluation:
    """Judge one model's outputs.

    ``loss`` is the log loss in nats (mean squared error for regression). Multiclass ``precision``, ``recall`` and
    ``f1`` are macro averages over the classes that occur among targets or predictions (0 where nothing was
    predicted); ``auc`` is the macro average, one class versus the rest, over the classes for which it exists, so that
    a client which lacks some classes still has one.

    Args:
        predictions: one per client, outputs ``(N, C)``: C = 1 logit for ``binary`` (positive means class 1), one
            logit a class for ``multiclass``, C = 1 value for ``regression``; targets ``(N,)``. N may be 0.
        task: ``binary``, ``multiclass`` or ``regression``.
        pooled: a set of all clients together; the clients' own examples laid end to end where it is None.

    *Guarantees*: what is undefined is NaN, never an error or a warning: anything without examples, AUC with one class
    present, R2 with fewer than two examples or constant targets, everything where an output is not finite. The result
    does not depend on the order of ``predictions``; `METRICS` gives the names and their order.
    """
    from sklearn import config_context

    ordered = sorted(predictions, key=lambda part: part.client)
    with config_context(assume_finite=True, skip_parameter_validation=True), np.errstate(all="ignore"):
        rows = [_judge(part.outputs, part.targets, task) for part in ordered]
        whole = pooled if pooled is not None else _end_to_end(ordered)
        of_all = _judge(whole.outputs, whole.targets, task, auc=_roc_auc)
    return Evaluation(
        pooled=of_all,
        clients=tuple(part.client for part in ordered),
        num_examples_K=np.array([len(part.targets) for part in ordered], np.int64),
        per_client={metric: np.array([row[metric] for row in rows], np.float64) for metric in METRICS[task]},
    )


def _end_to_end(parts: Sequence[Predictions]) -> Predictions:
    if not parts:
        return Predictions(client=-1, outputs=np.zeros((0, 1)), targets=np.zeros(0))
    outputs, targets = (np.concatenate(arrays) for arrays in zip(*((p.outputs, p.targets) for p in parts), strict=True))
    return Predictions(client=-1, outputs=outputs, targets=targets)


def _judge(outputs: np.ndarray, targets: np.ndarray, task: Task, *, auc: Auc | None = None) -> dict[str, float]:
    outputs_NC = np.asarray(outputs, np.float64)
    if not len(targets) or not np.isfinite(outputs_NC).all():
        return dict.fromkeys(METRICS[task], float("nan"))
    if task == "regression":
        values = _regression(outputs_NC, np.asarray(targets, np.float64))
    else:
        classify = _binary if task == "binary" else _multiclass
        # a client without examples may have brought floats into the targets of all
        values = classify(outputs_NC, np.asarray(targets, np.int64), auc or _pairs_ranked_right)
    return {metric: float(values[metric]) for metric in METRICS[task]}


def _binary(outputs_NC: np.ndarray, targets: np.ndarray, auc: Auc) -> dict[str, float]:
    logits, positive = outputs_NC[:, 0], targets == 1
    loss = np.logaddexp(0, np.where(positive, -logits, logits)).mean()
    hits = _hits(positive.astype(int), (logits > 0).astype(int), "binary")
    return {"loss": loss, "auc": auc(positive, logits)} | hits


def _multiclass(outputs_NC: np.ndarray, targets: np.ndarray, auc: Auc) -> dict[str, float]:
    log_p_NC = _log_softmax(outputs_NC)
    loss = -log_p_NC[np.arange(len(targets)), targets].mean()
    areas = [auc(targets == label, log_p_NC[:, label]) for label in np.unique(targets)]
    return {"loss": loss, "auc": float(np.mean(areas))} | _hits(targets, outputs_NC.argmax(axis=1), "macro")


def _regression(outputs_NC: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    values = outputs_NC[:, 0]
    mse = mean_squared_error(targets, values)
    explainable = len(targets) >= 2 and np.ptp(targets) > 0
    r2 = r2_score(targets, values) if explainable else float("nan")
    return {"loss": mse, "rmse": np.sqrt(mse), "mae": mean_absolute_error(targets, values), "r2": r2}


def _hits(targets: np.ndarray, predicted: np.ndarray, average: str) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(targets, predicted, average=average, zero_division=0.0)
    return dict(zip(("precision", "recall", "f1"), scores, strict=False)) | {"accuracy": np.mean(targets == predicted)}


def _roc_auc(positive: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(positive, score) if 0 < positive.sum() < len(positive) else float("nan")


def _pairs_ranked_right(positive: np.ndarray, score: np.ndarray) -> float:
    """AUC as the share of (positive, negative) pairs ranked right, ties counting half (Mann and Whitney, 1947)."""
    right, wrong = score[positive], np.sort(score[~positive])
    if not len(right) or not len(wrong):
        return float("nan")
    twice_below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")
    return float(twice_below.mean() / (2 * len(wrong)))


def _log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Log-probabilities that stay distinct near 0: the largest term is left out of the sum and given to log1p, so that
    confident examples do not tie in a ranking.
    """
    shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    others_NC = np.exp(shifted_NC)
    np.put_along_axis(others_NC, logits_NC.argmax(axis=1)[:, None], 0.0, axis=1)
    return shifted_NC - np.log1p(others_NC.sum(axis=1, keepdims=True))
