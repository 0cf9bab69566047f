"""Metrics of a model on held-out examples, pooled and for each client.

Shapes: K clients, N examples, C model outputs.

`fedlearn.core.segment_metrics` computes the metrics of all clients at once. The tests compare them with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np

from fedlearn.core.federated_data import Task
from fedlearn.core.records import ClientEvaluation, Evaluation, Predictions
from fedlearn.core.segment_metrics import confusion_scores, pooled_confusion, segment_metrics

METRICS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {
        "binary": ("loss", "accuracy", "auc", "auprc", "precision", "recall", "f1"),
        "multiclass": ("loss", "accuracy", "auc", "precision", "recall", "f1"),
        "regression": ("loss", "rmse", "mae", "r2"),
        "ranking": ("loss", "hr@10", "ndcg@10"),
    }
)
_LOWER_IS_BETTER = frozenset({"loss", "rmse", "mae", "attack_success"})


def main_metric(task: Task) -> str:
    """Return the main metric of tables and figures: ``accuracy``, ``rmse`` (regression) or ``hr@10`` (ranking)."""
    return {"regression": "rmse", "ranking": "hr@10"}.get(task, "accuracy")


def higher_is_better(metric: str) -> bool:
    """Return False for losses and errors, and True for all other metrics.

    >>> higher_is_better("accuracy"), higher_is_better("rmse")
    (True, False)
    """
    return metric not in _LOWER_IS_BETTER


def evaluate(predictions: Sequence[Predictions], *, task: Task, pooled: Predictions | None = None) -> Evaluation:
    """Compute the metrics of one model on held-out examples, pooled and for each client.

    ``loss`` is the log loss in nats, or the mean squared error for ``regression``. For ``multiclass``, ``precision``,
    ``recall`` and ``f1`` are macro averages over the classes that occur in targets or predictions. Their values are 0
    for a class without predictions. ``auc`` is the macro average, one class versus the rest, over the classes for which
    it is defined. So a client without some classes still has an AUC. For ``binary``, ``auprc`` is the average
    precision: the area under the curve of precision and recall, as a sum of steps. For random guesses it is the share
    of positives.

    For ``ranking``, the held-out part of a client is one list with one example of target 1. ``hr@10`` is 1 if fewer
    than ten other examples have outputs as high, else 0. ``ndcg@10`` is ``hr@10 / log2(1 + rank)``. The pooled values
    are means over the lists.

    Args:
        predictions: predictions of each client. The outputs are ``(N, C)`` and the targets ``(N,)``, with N >= 0.
            ``multiclass`` has one logit per class. Other tasks have C = 1: the logit of class 1 for ``binary``, a value
            for ``regression``, a score for ``ranking``. Sequences have outputs ``(N, T, C)`` and targets ``(N, T)``;
            each position is an example, except for positions of target -1.
        task: ``binary``, ``multiclass``, ``regression`` or ``ranking``.
        pooled: predictions on a held-out set of all clients; None for the union of the clients' examples.

    *Guarantees*: undefined values are NaN; there is no error and no warning. Values are undefined without examples, and
    with outputs that are not finite. AUC is undefined with one class, AUPRC without a positive, and R2 with constant
    targets or fewer than two examples. The result does not depend on the order of ``predictions``. `METRICS` gives
    names and order of the metrics.
    """
    ordered = [_flatten_sequences(part) for part in sorted(predictions, key=lambda part: part.client)]
    together, names = _concatenate(ordered), METRICS[task]
    count_K = np.array([len(part.targets) for part in ordered], np.int64)
    union = together if pooled is None else _flatten_sequences(pooled)
    with np.errstate(all="ignore"):
        per_client = segment_metrics(together.outputs, together.targets, count_K, task, names)
        size_1 = np.array([len(union.targets)])
        values = {
            name: float(value_1[0])
            for name, value_1 in segment_metrics(union.outputs, union.targets, size_1, task, names).items()
        }
    if task == "ranking" and pooled is None:  # lists of different clients are not one list
        values |= {metric: _mean_of_defined(per_client[metric].tolist()) for metric in names[1:]}
    return Evaluation(
        pooled=values,
        clients=tuple(part.client for part in ordered),
        num_examples_K=count_K,
        per_client=per_client,
        confusion_CC=pooled_confusion(union.outputs, union.targets, task),
    )


def evaluate_client(predictions: Predictions, *, task: Task, num_classes: int) -> ClientEvaluation:
    """Return the metrics of one client, and sums from which `combine_evaluations` computes pooled metrics.

    For classification, the sums are the total ``loss`` and the counts ``confusion`` (targets x predictions). For
    ``regression`` they are the totals of ``squared_error``, ``absolute_error``, ``target`` and ``target_squared``. For
    ``ranking`` they are the totals of the loss and of the metrics, and the number of ``lists``.

    The sums contain no output and no target. But sums over few examples can reveal single examples, so callers require
    a minimum number of examples.

    Args:
        predictions: outputs and targets; see `evaluate`.
        task: ``binary``, ``multiclass``, ``regression`` or ``ranking``.
        num_classes: number of classes of the task, including classes that this client does not have.
    """
    predictions = _flatten_sequences(predictions)
    metrics = evaluate([predictions], task=task).per_client
    outputs_NC, targets_N = np.asarray(predictions.outputs, np.float64), predictions.targets
    if task == "regression":
        sums = _error_sums(outputs_NC, targets_N)
    elif task == "ranking":
        sums = _list_sums(metrics, len(targets_N))
    else:
        sums = _class_sums(metrics, outputs_NC, targets_N, num_classes)
    return ClientEvaluation(
        client=predictions.client,
        num_examples=len(targets_N),
        metrics={metric: float(values_K[0]) for metric, values_K in metrics.items()},
        sums=sums,
    )


def _error_sums(outputs_NC: np.ndarray, targets_N: np.ndarray) -> dict[str, np.ndarray]:
    error_N, targets_N = outputs_NC[:, 0] - targets_N, np.asarray(targets_N, np.float64)
    columns = {"squared_error": error_N**2, "absolute_error": abs(error_N)}
    columns |= {"target": targets_N, "target_squared": targets_N**2}
    return {name: np.asarray(column_N.sum(), np.float64) for name, column_N in columns.items()}


def _list_sums(metrics: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    sums = {metric: np.nan_to_num(values_K[0]) for metric, values_K in metrics.items()}
    sums |= {"loss": sums["loss"] * count, "lists": float(np.isfinite(metrics["hr@10"][0]))}
    return {name: np.asarray(value, np.float64) for name, value in sums.items()}


def _class_sums(
    metrics: Mapping[str, np.ndarray], outputs_NC: np.ndarray, targets_N: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    predicted_N = outputs_NC[:, 0] > 0 if outputs_NC.shape[1] == 1 else outputs_NC.argmax(axis=1)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (np.asarray(targets_N, np.int64), predicted_N.astype(np.int64)), 1)
    total = metrics["loss"][0] * len(targets_N) if len(targets_N) else 0.0
    return {"loss": np.asarray(total, np.float64), "confusion": confusion}


def combine_evaluations(client_evaluations: Sequence[ClientEvaluation], *, task: Task) -> Evaluation:
    """Return the evaluation of clients that send sums instead of outputs.

    *Guarantees*: the values agree with `evaluate` on the outputs, up to 1e-9, except for the pooled AUC and AUPRC.
    These are NaN, because they compare the scores of different clients. A histogram of scores that is precise enough to
    replace the scores would reveal single patients of a small hospital. AUC and AUPRC of each client are available, and
    so are their mean, standard deviation and worst tenth.
    """
    ordered = sorted(client_evaluations, key=lambda evaluation: evaluation.client)
    count_K = np.array([evaluation.num_examples for evaluation in ordered], np.int64)
    nonempty = [evaluation for evaluation in ordered if evaluation.num_examples]
    values, confusion_CC = dict.fromkeys(METRICS[task], float("nan")), None
    if nonempty:
        sums = {name: np.sum([evaluation.sums[name] for evaluation in nonempty], axis=0) for name in nonempty[0].sums}
        with np.errstate(all="ignore"):
            values |= _FROM_SUMS[task](sums, int(count_K.sum()))
        confusion_CC = sums.get("confusion")
    return Evaluation(
        pooled=values,
        clients=tuple(evaluation.client for evaluation in ordered),
        num_examples_K=count_K,
        per_client={
            metric: np.array([evaluation.metrics[metric] for evaluation in ordered]) for metric in METRICS[task]
        },
        confusion_CC=confusion_CC,
    )


def _from_error_sums(sums: Mapping[str, np.ndarray], count: int) -> dict[str, float]:
    mse, mae = sums["squared_error"] / count, sums["absolute_error"] / count
    spread = sums["target_squared"] - sums["target"] ** 2 / count
    r2 = 1 - sums["squared_error"] / spread if count >= 2 and spread > 0 else np.nan
    return {"loss": float(mse), "rmse": float(np.sqrt(mse)), "mae": float(mae), "r2": float(r2)}


def _from_class_sums(task: Task, sums: Mapping[str, np.ndarray], count: int) -> dict[str, float]:
    values = {name: score_1[0] for name, score_1 in confusion_scores(sums["confusion"][None], task).items()}
    return {name: float(value) for name, value in ({"loss": sums["loss"] / count} | values).items()}


def _flatten_sequences(part: Predictions) -> Predictions:
    """Return predictions with one example per position of a sequence, without padding (target -1)."""
    if part.targets.ndim == 1:
        return part
    is_real_NT = part.targets >= 0
    return replace(part, outputs=part.outputs[is_real_NT], targets=part.targets[is_real_NT])


def _from_list_sums(sums: Mapping[str, np.ndarray], count: int) -> dict[str, float]:
    means = {name: float(sums[name] / sums["lists"]) for name in METRICS["ranking"][1:]}
    return {"loss": float(sums["loss"] / count)} | means


_FROM_SUMS: Mapping[Task, Callable[..., dict[str, float]]] = MappingProxyType(
    {
        "binary": partial(_from_class_sums, "binary"),
        "multiclass": partial(_from_class_sums, "multiclass"),
        "regression": _from_error_sums,
        "ranking": _from_list_sums,
    }
)


def _concatenate(parts: Sequence[Predictions]) -> Predictions:
    if not parts:
        return Predictions(client=-1, outputs=np.zeros((0, 1)), targets=np.zeros(0))
    outputs, targets = (np.concatenate(arrays) for arrays in zip(*((p.outputs, p.targets) for p in parts), strict=True))
    return Predictions(client=-1, outputs=outputs, targets=targets)


def _mean_of_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")
