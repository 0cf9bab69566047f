"""Write the results of a tuning: a table of all trials, figures, and a page."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.advice import shell_word
from fedlearn.callbacks.formatting import format_metric
from fedlearn.errors import MissingExtra
from fedlearn.runner.tuning.privacy_total import PrivacyTotal
from fedlearn.runner.tuning.study import Tuning, import_optuna
from fedlearn.runner.tuning.trial_run import TrialResult

TRIALS_FILE, PAGE_FILE, IMPORTANCE_FIGURE, SLICE_FIGURE = "trials.csv", "tuning.md", "importance.png", "slices.png"


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """Result of a tuning.

    Attributes:
        folder: folder of the tuning, with all runs.
        metric: name of the metric.
        default: value of the run with default values.
        best: value of the best trial; None if no trial has a value.
        best_settings: setting -> value of the best trial; empty without a value.
        importance: setting -> share of the variance of the metric, sums to 1; empty with few trials.
        privacy: privacy loss of all runs together; None without a guarantee.
        command: command that repeats the best run.
        text: summary for a terminal.
    """

    folder: Path
    metric: str
    default: float
    best: float | None
    best_settings: Mapping[str, str]
    importance: Mapping[str, float]
    privacy: PrivacyTotal | None
    command: str
    text: str


def write_results(tuning: Tuning, study: Any, default: TrialResult, privacy: PrivacyTotal | None) -> TuningResult:
    """Write ``trials.csv``, ``tuning.md`` and the figures, and return the result."""
    best = _best(study)
    settings = {} if best is None else {n: tuning.space.ranges[n].text(v) for n, v in best.params.items()}
    importance = _importance(study)
    seeds = tuning.space.seeds
    command = _command([*tuning.space.fixed, *(f"{name}={value}" for name, value in settings.items())], seeds)
    lines = _lines(default, None if best is None else best.value, settings, importance, privacy, command, seeds)
    _write_trials(tuning, study)
    _draw(tuning, study, default, importance)
    page = "\n".join(["# Tuning", "", *(f"- {line}" for line in lines), ""])
    (tuning.folder / PAGE_FILE).write_text(page, encoding="utf-8")
    return TuningResult(
        folder=tuning.folder,
        metric=default.metric,
        default=default.value,
        best=None if best is None else float(best.value),
        best_settings=settings,
        importance=importance,
        privacy=privacy,
        command=command,
        text="\n".join([*lines, f"saved {tuning.folder}", ""]),
    )


def _best(study: Any) -> Any:
    complete = import_optuna().trial.TrialState.COMPLETE
    return study.best_trial if study.get_trials(deepcopy=False, states=(complete,)) else None


def _lines(
    default: TrialResult,
    best: float | None,
    settings: Mapping[str, str],
    importance: Mapping[str, float],
    privacy: PrivacyTotal | None,
    command: str,
    seeds: Sequence[str],
) -> list[str]:
    if best is None:
        return ["no trial has a value"]
    metric = default.metric
    values = ", ".join(f"{name}={value}" for name, value in settings.items())
    better = best > default.value if default.maximize else best < default.value
    mean = f" (mean of {len(seeds)} seeds)" if seeds else ""
    lines = [
        f"best {metric} {format_metric(metric, best)}{mean} with {values}",
        f"default values {format_metric(metric, default.value)}" + ("" if better else ", no trial is better"),
    ]
    if importance:
        lines.append("importance " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in importance.items()))
    if privacy is not None:
        rule = "all releases composed" if privacy.rule == "composition" else "sum of the runs, whose noise differs"
        epsilon = math.ceil(privacy.epsilon * 1000) / 1000 if math.isfinite(privacy.epsilon) else privacy.epsilon
        lines.append(
            f"privacy of all {privacy.num_runs} runs together: epsilon {epsilon:g} at delta {privacy.delta:g} ({rule})"
        )
        lines.append("the epsilon does not cover the metrics on held-out examples, which have no noise")
    lines.append("the trials were compared on the held-out examples: confirm the result with other seeds")
    lines.append(f"to repeat: {command}")
    return lines


def _command(overrides: Sequence[str], seeds: Sequence[str]) -> str:
    words = ["-m", *overrides, f"seed={','.join(seeds)}"] if seeds else overrides
    return " ".join(["python -m simulations.run", *map(shell_word, words)])


def _write_trials(tuning: Tuning, study: Any) -> None:
    names = list(tuning.space.ranges)
    with open(tuning.folder / TRIALS_FILE, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "value", *names])
        for trial in study.get_trials(deepcopy=False):
            values = [tuning.space.ranges[name].text(trial.params[name]) for name in names if name in trial.params]
            value = "" if trial.value is None else repr(trial.value)
            writer.writerow([trial.number, trial.state.name.lower(), value, *values])


def _importance(study: Any) -> dict[str, float]:
    """Return the share of each setting in the variance of the metric, or nothing with fewer than two values."""
    optuna = import_optuna()
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < 4 or len({trial.value for trial in complete}) < 2 or len(complete[0].params) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _draw(tuning: Tuning, study: Any, default: TrialResult, importance: Mapping[str, float]) -> None:
    """Draw the figures. Without matplotlib, the table and the page remain."""
    try:
        from fedlearn.callbacks import figure_style
        from fedlearn.runner.tuning import tuning_figures

        with figure_style.style():
            complete = study.get_trials(deepcopy=False, states=(import_optuna().trial.TrialState.COMPLETE,))
            if complete:
                figure = tuning_figures.slices(complete, tuning.space.ranges, default.metric, default=default.value)
                figure.savefig(tuning.folder / SLICE_FIGURE, dpi=figure_style.DOTS_PER_INCH)
            if importance:
                figure = tuning_figures.importance(importance)
                figure.savefig(tuning.folder / IMPORTANCE_FIGURE, dpi=figure_style.DOTS_PER_INCH)
    except MissingExtra:
        return
