"""When to stop: an onlooker that says so, and leaves the breaking to whoever runs the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlearn.callbacks.run_history import History, metric_values
from fedlearn.core.federated_data import Task
from fedlearn.core.metrics import METRICS, higher_is_better, main_metric
from fedlearn.errors import did_you_mean, is_count, is_number, require


@dataclass(frozen=True)
class EarlyStop:
    """Stop once a metric has gone ``patience`` evaluations without a gain.

    Args:
        metric: of the pooled evaluation, one of ``METRICS[task]``.
        patience: evaluations in a row without a gain, >= 1.
        min_delta: a gain counts when it is more than this, >= 0, in units of the metric.
        task: tells which metrics there are.

    *Guarantees*: the decision is a function of the history alone, so a resumed run stops at the same round. A value
    that is NaN is no gain; the first value that is not NaN is one.

    >>> history = [{"round": r, "test": {"loss": loss}} for r, loss in enumerate([0.9, 0.7, 0.8, 0.7], start=1)]
    >>> EarlyStop("loss", 2, task="binary").reason(history)
    'loss has not improved for 2 evaluations (best 0.7 at round 2)'
    """

    metric: str
    patience: int
    min_delta: float = 0.0
    task: Task = "multiclass"

    def __post_init__(self) -> None:
        known = METRICS[self.task]
        near = did_you_mean(str(self.metric), known) or main_metric(self.task)
        fix = f"early_stop.metric={near}"
        require(self.metric in known, "early_stop.metric", self.metric, f"one of {', '.join(known)}", fix)
        patient = is_count(self.patience)
        require(patient, "early_stop.patience", self.patience, "a whole number >= 1", "early_stop.patience=5")
        gain = is_number(self.min_delta, at_least=0)
        require(gain, "early_stop.min_delta", self.min_delta, "a number >= 0", "early_stop.min_delta=0.001")

    def reason(self, history: History) -> str | None:
        """Why to stop after the last round of ``history``, or None to go on."""
        best, best_round, waited = math.nan, 0, 0
        for number, value in metric_values(history, self.metric):
            if self._gains(value, best):
                best, best_round, waited = value, number, 0
            else:
                waited += 1
        if waited < self.patience:
            return None
        since = f"best {best:.4g} at round {best_round}" if best_round else "it was never defined"
        return f"{self.metric} has not improved for {waited} evaluations ({since})"

    def _gains(self, value: float, best: float) -> bool:
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        gain = value - best if higher_is_better(self.metric) else best - value
        return gain > self.min_delta
