"""End a run early if its metric no longer improves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_history import History, HistoryEntry, finite_or_none, metric_values
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.metrics import higher_is_better
from fedlearn.core.records import Round
from fedlearn.core.tasks import Task, as_task
from fedlearn.errors import did_you_mean, is_count, is_number, require


@dataclass(frozen=True)
class EarlyStop:
    """Stopping rule: stop after ``patience`` evaluations of a metric without a gain.

    Args:
        metric: metric of the pooled evaluation, one of the metrics of the task.
        patience: number of consecutive evaluations without a gain, >= 1.
        min_delta: an improvement counts as a gain if it is larger than this, in units of the metric, >= 0; default 0.
        task: task of the scenario, which has the known metrics, or the name of a shipped task; default
            ``multiclass``.

    *Guarantees*: the decision is a function of the history alone, so a resumed run stops at the same round. A NaN is
    never a gain. The first value that is not NaN is a gain.

    >>> history = [{"round": r, "test": {"loss": loss}} for r, loss in enumerate([0.9, 0.7, 0.8, 0.7], start=1)]
    >>> EarlyStop("loss", 2, task="binary").reason(history)
    'loss has not improved for 2 evaluations (best 0.7 at round 2)'
    """

    metric: str
    patience: int
    min_delta: float = 0.0
    task: Task | str = "multiclass"

    def __post_init__(self) -> None:
        task = as_task(self.task)
        known = task.metric_names
        near = did_you_mean(str(self.metric), known) or task.main_metric
        fix = f"early_stop.metric={near}"
        require(self.metric in known, "early_stop.metric", self.metric, f"one of {', '.join(known)}", fix)
        patient = is_count(self.patience)
        require(patient, "early_stop.patience", self.patience, "a whole number >= 1", "early_stop.patience=5")
        gain = is_number(self.min_delta, at_least=0)
        require(gain, "early_stop.min_delta", self.min_delta, "a number >= 0", "early_stop.min_delta=0.001")

    def reason(self, history: History) -> str | None:
        """Return the reason to stop after the last round of ``history``, or None."""
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
        is_gain_up = higher_is_better(self.metric, as_task(self.task).lower_is_better)
        gain = value - best if is_gain_up else best - value
        return gain > self.min_delta


class EarlyStopping(Callback):
    """End the run after ``patience`` evaluations of a metric without a gain, see `EarlyStop`.

    Args:
        metric: metric of the pooled evaluation; None, the default, runs all rounds.
        patience: number of consecutive evaluations without a gain, >= 1; default 5.
        min_delta: a gain is larger than this, in units of the metric, >= 0; default 0.
    """

    ends_run_on_error = True

    def __init__(self, *, metric: str | None = None, patience: int = 5, min_delta: float = 0.0) -> None:
        EarlyStop("loss", patience, min_delta)
        self._metric, self._patience, self._min_delta = metric, patience, min_delta
        self._rule: EarlyStop | None = None
        self._history: list[HistoryEntry] = []

    def on_start(self, run: RunInfo) -> str | None:
        """Read the history of a resumed run. Return the reason to stop if the rule already applies."""
        if self._metric is not None:
            self._rule = EarlyStop(self._metric, self._patience, self._min_delta, run.task)
        self._history = list(run.history)
        return self._reason()

    def on_round(self, round: Round) -> str | None:
        """Return the reason to stop, or None to continue."""
        if self._rule is not None and round.evaluation is not None:
            pooled = round.evaluation.pooled
            values = {name: finite_or_none(pooled[name]) for name in (self._rule.metric,) if name in pooled}
            self._history.append({"round": round.number, "test": values})
        return self._reason()

    def _reason(self) -> str | None:
        return self._rule.reason(self._history) if self._rule else None
