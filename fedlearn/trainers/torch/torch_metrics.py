"""Use a metric of torchmetrics as a metric of a task. Its states leave a node as sums."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from fedlearn.core.metric import COUNT, Metric
from fedlearn.errors import require


def from_torchmetrics(name: str, metric: Any, *, higher_is_better: bool | None = None) -> Metric:
    """Return a metric of fedlearn that computes a metric of torchmetrics.

    The outputs and the targets of the model pass to ``metric.update`` without changes: logits and class numbers, for
    example. A sequence or an image keeps its axes.

    Args:
        name: name of the metric in tables and settings.
        metric: object of ``torchmetrics.Metric``. All its states have the reduction ``sum``, so that they add up over
            clients, and ``compute`` returns one number.
        higher_is_better: True if high values are good; None takes the attribute of the metric.

    Raises:
        SettingError: a state has another reduction, or the direction of the metric is unknown.
    """
    shared = deepcopy(metric)
    for state, reduction in shared._reductions.items():
        is_sum = reduction is torch.sum or getattr(reduction, "__name__", "") == "dim_zero_sum"
        setting, fix = f"state {state} of metric {name}", "a metric with thresholds, or Metric(whole=...)"
        require(is_sum, setting, "no sum", "a sum over examples, so that the metric federates", fix)
    is_high = metric.higher_is_better if higher_is_better is None else higher_is_better
    fix = f"from_torchmetrics({name!r}, ..., higher_is_better=True)"
    require(is_high is not None, f"higher_is_better of metric {name}", None, "True or False", fix)

    def batch_sums(outputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        shared.reset()
        if len(targets):
            shared.update(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (outputs, targets)))
        return {state: getattr(shared, state).double().numpy().copy() for state in shared._reductions}

    def finish(sums: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.array([compute({state: rows[k] for state, rows in sums.items()}) for k in range(len(sums[COUNT]))])

    def compute(states: Mapping[str, np.ndarray]) -> float:
        shared.reset()
        for state in shared._reductions:
            value = torch.from_numpy(np.asarray(states[state]))
            setattr(shared, state, value.to(getattr(shared, state).dtype))
        shared._update_count = 1  # otherwise torchmetrics warns that there was no update
        return float(shared.compute())

    return Metric(name=name, batch_sums=batch_sums, finish=finish, higher_is_better=bool(is_high))
