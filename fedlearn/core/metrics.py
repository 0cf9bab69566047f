"""Evaluate a model on held-out examples, pooled and for each client.

Shapes: K clients, N examples, C model outputs.

All clients are evaluated at once. The tests compare the metrics with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlearn.core.metric import COUNT, Sums, SumsOf
from fedlearn.core.records import ClientEvaluation, Evaluation, Predictions
from fedlearn.core.segments import Counts, Segments
from fedlearn.core.tasks import TASKS, Task, as_task
from fedlearn.errors import require

CONFUSION = "confusion"
# the share of a backdoor is a metric of a scenario, not of a task
_LOWER_IS_BETTER = frozenset({"attack_success"}.union(*(task.lower_is_better for task in TASKS.values())))


def main_metric(task: Task | str) -> str:
    """Return the main metric of tables and figures, e.g. ``accuracy`` for ``binary``."""
    return as_task(task).main_metric


def higher_is_better(metric: str, lower_is_better: Sequence[str] = ()) -> bool:
    """Return False for losses and errors, and True for all other metrics.

    Args:
        metric: name of a metric.
        lower_is_better: names of the metrics of the user whose low values are good.

    >>> higher_is_better("accuracy"), higher_is_better("rmse"), higher_is_better("gap", ["gap"])
    (True, False, False)
    """
    return metric not in _LOWER_IS_BETTER and metric not in lower_is_better


def evaluate(predictions: Sequence[Predictions], *, task: Task | str, pooled: Predictions | None = None) -> Evaluation:
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
            ``multiclass`` has one logit per class. ``binary``, ``regression`` and ``ranking`` have C = 1: the logit of
            class 1, a value, or a score. For ``multiclass``, sequences have outputs ``(N, T, C)`` and targets
            ``(N, T)``; each position is an example, except for positions of target -1. The modules of
            `fedlearn.core.tasks` describe the other tasks.
        task: a task, or the name of a shipped task.
        pooled: predictions on a held-out set of all clients; None for the union of the clients' examples.

    *Guarantees*: undefined values are NaN; there is no error and no warning. Values are undefined without examples, and
    with outputs that are not finite. AUC is undefined with one class, AUPRC without a positive, and R2 with constant
    targets or fewer than two examples. R2 of a client is at least -1, so that clients with nearly constant targets do
    not rule the mean over clients. The result does not depend on the order of ``predictions``.
    """
    task = as_task(task)
    ordered = [_flatten_sequences(part, task) for part in sorted(predictions, key=lambda part: part.client)]
    together = _concatenate(ordered)
    count_K = np.array([len(part.targets) for part in ordered], np.int64)
    union = together if pooled is None else _flatten_sequences(pooled, task)
    with np.errstate(all="ignore"):
        rows = _ExampleSums(together, task)
        per_client, _ = _segment_metrics(rows, count_K, task)
        union_rows = rows if pooled is None else _ExampleSums(union, task)
        pooled_1, sums_1 = _segment_metrics(union_rows, np.array([len(union.targets)]), task)
    values = {name: float(value_1[0]) for name, value_1 in pooled_1.items()}
    if pooled is None:
        values |= _means_over_clients(per_client, count_K, task)
    confusion_1CC = sums_1.get(CONFUSION) if task.is_classification else None
    return Evaluation(
        pooled=values,
        clients=tuple(part.client for part in ordered),
        num_examples_K=count_K,
        per_client=_with_floors(per_client, task),
        confusion_CC=None if confusion_1CC is None else confusion_1CC[0],
        lower_is_better=task.lower_is_better,
    )


def evaluate_client(predictions: Predictions, *, task: Task | str) -> ClientEvaluation:
    """Return the metrics of one client, and sums from which `combine_evaluations` computes pooled metrics.

    For classification, the sums are the total ``loss`` and the counts ``confusion`` (targets x predictions). For
    ``regression`` they are the totals of ``squared_error``, ``absolute_error``, ``target`` and ``target_squared``. A
    metric of the user has its sums, with the name of the metric before their names.

    The sums contain no output and no target. But sums over few examples can reveal single examples, so callers require
    a minimum number of examples.

    Args:
        predictions: outputs and targets; see `evaluate`.
        task: see `evaluate`.
    """
    task = as_task(task)
    predictions = _flatten_sequences(predictions, task)
    metrics = evaluate([predictions], task=task).per_client
    return ClientEvaluation(
        client=predictions.client,
        num_examples=len(predictions.targets),
        metrics={metric: float(values_K[0]) for metric, values_K in metrics.items()},
        sums=_client_sums(predictions, task),
    )


def combine_evaluations(client_evaluations: Sequence[ClientEvaluation], *, task: Task | str) -> Evaluation:
    """Return the evaluation of clients that send sums instead of outputs.

    *Guarantees*: the values agree with `evaluate` on the outputs, up to 1e-9, except for the pooled values of metrics
    that need all outputs, e.g. AUC. These are NaN, because they compare the scores of different clients. A histogram of
    scores that is precise enough to replace the scores would reveal single patients of a small hospital. AUC and AUPRC
    of each client are available, and so are their mean, standard deviation and worst tenth.
    """
    task = as_task(task)
    ordered = sorted(client_evaluations, key=lambda evaluation: evaluation.client)
    count_K = np.array([evaluation.num_examples for evaluation in ordered], np.int64)
    nonempty = [evaluation for evaluation in ordered if evaluation.num_examples]
    per_client = {name: np.array([evaluation.metrics[name] for evaluation in ordered]) for name in task.metric_names}
    values, confusion_CC = dict.fromkeys(task.metric_names, float("nan")), None
    if nonempty:
        totals = {name: np.sum([evaluation.sums[name] for evaluation in nonempty], axis=0) for name in nonempty[0].sums}
        with np.errstate(all="ignore"):
            finished = _finish({name: total[None] for name, total in totals.items()}, count_K.sum()[None], task)
        values |= {name: float(value_1[0]) for name, value_1 in finished.items()}
        confusion_CC = totals.get(CONFUSION) if task.is_classification else None
    values |= _means_over_clients(per_client, count_K, task)
    return Evaluation(
        pooled=values,
        clients=tuple(evaluation.client for evaluation in ordered),
        num_examples_K=count_K,
        per_client=_with_floors(per_client, task),
        confusion_CC=confusion_CC,
        lower_is_better=task.lower_is_better,
    )


class _ExampleSums:
    """Values of each example that the metrics add up, computed once for single clients and for all of them.

    Args:
        part: outputs and targets.
        task: the task.

    Attributes:
        outputs: outputs of all examples, float64.
        targets: targets of all examples.
        is_bad_N: True for examples with an output that is not finite.
    """

    def __init__(self, part: Predictions, task: Task) -> None:
        self.outputs, self.targets = np.asarray(part.outputs, np.float64), np.asarray(part.targets)
        self.is_bad_N = ~np.isfinite(self.outputs).all(axis=tuple(range(1, self.outputs.ndim)))
        self._task = task
        self._all: Sums | None = None  # values of all examples, after their first use

    def of(self, kept_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, Sums]:
        """Return outputs, targets and values of some examples, which have finite outputs."""
        if kept_N.all():
            self._all = self._all or _example_sums(self.outputs, self.targets, self._task)
            return self.outputs, self.targets, self._all
        outputs, targets = self.outputs[kept_N], self.targets[kept_N]
        return outputs, targets, _example_sums(outputs, targets, self._task)


def _segment_metrics(
    part: _ExampleSums, sizes_K: np.ndarray, task: Task
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the metrics and the sums of each segment.

    A segment without examples, or with an output that is not finite, has NaN. The sums are empty without another
    segment.
    """
    sizes_K = np.asarray(sizes_K, np.int64)
    index_N = np.repeat(np.arange(len(sizes_K)), sizes_K)
    is_defined_K = (sizes_K > 0) & (np.bincount(index_N[part.is_bad_N], minlength=len(sizes_K)) == 0)
    values = {name: np.full(len(sizes_K), np.nan) for name in task.metric_names}
    if not is_defined_K.any():
        return values, {}
    segments = Segments(sizes_K[is_defined_K])
    outputs, targets, rows = part.of(is_defined_K[index_N])
    sums = {name: segments.sum(values_N) for name, values_N in rows.items()}
    sums |= _batch_sums(segments, outputs, targets, task)
    computed = _finish(sums, segments.sizes_K, task)
    computed |= {metric.name: metric.whole(segments, outputs, targets) for metric in task.metrics if metric.whole}
    for name in task.metric_names:
        values[name][is_defined_K] = computed[name]
    return values, sums


def _prefixes(task: Task) -> dict[str, str]:
    """Return the prefix of the names of the sums of each metric with sums.

    Metrics of a task share sums. A metric of the user, and a metric with sums of a batch, has its name as prefix.
    """
    first_added = len(task.metrics) - task.num_added
    return {
        metric.name: f"{metric.name}." if number >= first_added or metric.batch_sums else ""
        for number, metric in enumerate(task.metrics)
        if metric.finish is not None
    }


def _batch_sums(segments: Segments, outputs: np.ndarray, targets: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """Return the sums of each segment, for the metrics that compute them from all examples of a client."""
    sums: dict[str, np.ndarray] = {}
    for metric in task.metrics:
        if metric.batch_sums is not None:
            ends = segments.start_K + segments.sizes_K
            parts = [slice(*pair) for pair in zip(segments.start_K, ends, strict=True)]
            of_parts = [metric.batch_sums(outputs[part], targets[part]) for part in parts]
            sums |= {f"{metric.name}.{name}": np.stack([part[name] for part in of_parts]) for name in of_parts[0]}
    return sums


def _example_sums(outputs: np.ndarray, targets: np.ndarray, task: Task) -> Sums:
    """Return the values of each example that all metrics of a task add up."""
    computed: dict[SumsOf, Sums] = {}
    sums: dict[str, np.ndarray | Counts] = {}
    prefixes = _prefixes(task)
    for metric in task.metrics:
        function, prefix = metric.sums, prefixes.get(metric.name, "")
        if function is None or (function in computed and not prefix):
            continue
        rows = computed[function] = computed.get(function) or function(outputs, targets)
        for name in rows:
            is_free, setting = f"{prefix}{name}" not in sums, f"sum of metric {metric.name}"
            require(is_free, setting, name, "a name that no other metric of the task uses", f"{metric.name}_{name}")
        sums |= {f"{prefix}{name}": values for name, values in rows.items()}
    return sums


def _finish(sums: Mapping[str, np.ndarray], count_K: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """Return the value of each metric with sums, ``(K,)``."""
    values, prefixes = {}, _prefixes(task)
    for metric in task.metrics:
        if metric.finish is None:
            continue
        prefix = prefixes[metric.name]
        chosen = {name.removeprefix(prefix): rows for name, rows in sums.items() if name.startswith(prefix)}
        values[metric.name] = np.broadcast_to(metric.finish({**chosen, COUNT: count_K}), count_K.shape)
    return values


def _client_sums(predictions: Predictions, task: Task) -> dict[str, np.ndarray]:
    outputs, targets = np.asarray(predictions.outputs, np.float64), np.asarray(predictions.targets)
    with np.errstate(all="ignore"):
        rows = _example_sums(outputs, targets, task)
    segment = Segments(np.array([len(targets)]))
    batch_1 = _batch_sums(segment, outputs, targets, task)
    batch = {name: np.asarray(total_1[0], np.float64) for name, total_1 in batch_1.items()}
    if not len(targets):
        return batch | {name: np.zeros(_shape_of_sum(values)) for name, values in rows.items()}
    return batch | {name: np.asarray(segment.sum(values)[0], np.float64) for name, values in rows.items()}


def _shape_of_sum(values: np.ndarray | Counts) -> tuple[int, ...]:
    return values.shape if isinstance(values, Counts) else values.shape[1:]


def _with_floors(per_client: Mapping[str, np.ndarray], task: Task) -> dict[str, np.ndarray]:
    """Return the values of clients, at least the floor of their metric; NaN stays."""
    floors = {metric.name: metric.client_floor for metric in task.metrics if metric.client_floor is not None}
    return {
        name: np.maximum(values_K, floors[name]) if name in floors else values_K
        for name, values_K in per_client.items()
    }


def _flatten_sequences(part: Predictions, task: Task) -> Predictions:
    """Return predictions with one example per position of a sequence, without padding (target -1)."""
    if part.targets.ndim == 1 or not task.positions_are_examples:
        return part
    is_real_NT = part.targets >= 0
    return replace(part, outputs=part.outputs[is_real_NT], targets=part.targets[is_real_NT])


def _concatenate(parts: Sequence[Predictions]) -> Predictions:
    if not parts:
        return Predictions(client=-1, outputs=np.zeros((0, 1)), targets=np.zeros(0))
    outputs, targets = (np.concatenate(arrays) for arrays in zip(*((p.outputs, p.targets) for p in parts), strict=True))
    return Predictions(client=-1, outputs=outputs, targets=targets)


def _means_over_clients(per_client: Mapping[str, np.ndarray], count_K: np.ndarray, task: Task) -> dict[str, float]:
    """Return the pooled values that are means over clients: of lists, and of metrics within one client."""
    lists = [metric.name for metric in task.metrics if metric.whole and task.averages_lists]
    means = {name: _mean_of_defined(per_client[name]) for name in lists}
    for metric in task.metrics:
        if metric.is_stratified:
            weight_K = count_K * ~np.isnan(per_client[metric.name])
            total = float(np.sum(weight_K * np.nan_to_num(per_client[metric.name])))
            means[metric.name] = total / float(weight_K.sum()) if weight_K.any() else float("nan")
    return means


def _mean_of_defined(values_K: np.ndarray) -> float:
    defined = values_K[~np.isnan(values_K)]
    return float(np.mean(defined)) if len(defined) else float("nan")
