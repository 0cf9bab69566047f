"""Run the trials of a tuning: one run folder for each trial, with pruning and a record of the privacy loss."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.command_line import DONE, STOPPED
from fedlearn.core.metrics import higher_is_better
from fedlearn.core.private_files import write_private_json
from fedlearn.core.records import Round
from fedlearn.errors import FedlearnError
from fedlearn.runner.compat import command_line_parser
from fedlearn.runner.compose import Job, compose, with_custom_targets
from fedlearn.runner.parts import Parts
from fedlearn.runner.plan import build_plan
from fedlearn.runner.run_mode import simulation_with
from fedlearn.runner.start import run
from fedlearn.runner.tuning.privacy_total import LEDGER_FILE

RESULT_FILE = "tuning_result.json"
PRUNED = "the values of this trial are worse than the median of earlier trials"
Report = Callable[[int, float], bool]  # round, value of the metric -> whether to end the trial


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Result of a run of a trial, or of all its runs.

    Attributes:
        value: main metric after the last round, the mean of several runs; NaN without a value.
        metric: name of the metric.
        maximize: True if a larger value is better.
        is_pruned: True if the run ended early, because earlier trials have better values.
        problem: cause of a failure; empty otherwise.
        stopped: True after Ctrl-C.
        delta: delta of the privacy guarantee; None without a guarantee.
    """

    value: float
    metric: str = ""
    maximize: bool = True
    is_pruned: bool = False
    problem: str = ""
    stopped: bool = False
    delta: float | None = None

    @property
    def has_no_value(self) -> bool:
        """True if the run failed or was stopped, so that its value does not count."""
        return bool(self.problem) or self.stopped or math.isnan(self.value)

    def write(self, folder: Path) -> None:
        """Write the result to a run folder."""
        write_private_json(folder / RESULT_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> TrialResult | None:
        """Return the result that `write` wrote, or None without a result.

        Raises:
            FedlearnError: the file is damaged.
        """
        path = folder / RESULT_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
        except (OSError, ValueError, TypeError) as error:
            fix = f"remove {path}, so that the run with default values is repeated"
            raise FedlearnError(f"{path} cannot be read: {error}\n  expected  a result\n  advice    {fix}") from error


class TrialWatch(Callback):
    """Report the metric of each evaluation, end a hopeless trial, and record the privacy loss of each round."""

    ends_run_on_error = True  # no release without its record

    def __init__(self, report: Report = lambda number, value: False) -> None:
        self._report = report
        self.info: RunInfo | None = None
        self.is_pruned = False

    def on_start(self, run: RunInfo) -> None:
        """Keep the description of the run."""
        self.info = run

    def on_round(self, round: Round) -> str | None:
        """Record the ledger, and report the main metric. Return a reason to end a hopeless trial."""
        assert self.info is not None
        if round.privacy is not None:
            write_private_json(self.info.folder / LEDGER_FILE, round.state.ledger.to_json())
        value = round.evaluation.pooled.get(self.info.main_metric) if round.evaluation is not None else None
        if value is None or value != value or round.number >= self.info.rounds:
            return None
        self.is_pruned = self._report(round.number, float(value))
        return PRUNED if self.is_pruned else None


def compose_trial(overrides: list[str], config_dir: str | None) -> Job:
    """Return the configuration of a trial.

    Raises:
        UsageError: a setting does not exist, or a value is wrong.
    """
    args: Namespace = command_line_parser().parse_args([])
    args.config_dir = config_dir
    args.overrides = with_custom_targets(overrides)
    (job,) = compose(args)
    return job


def run_trial(overrides: list[str], folder: Path, *, config_dir: str | None = None, watch: TrialWatch) -> TrialResult:
    """Run one trial in a folder. A failed run is a result; a wrong setting too, after the check before the trials."""
    try:
        job = compose_trial(overrides, config_dir)
        outcome = run(
            replace(job, folder=folder, chosen=True),
            build_plan(job.cfg),
            run_mode=simulation_with(Parts(callbacks={"tuning": watch})),
        )
    except FedlearnError as error:
        return TrialResult(value=float("nan"), problem=str(error))
    stopped = outcome.exit_code == STOPPED
    problem = "" if outcome.exit_code in (DONE, STOPPED) else outcome.reason or "the run failed"
    if watch.info is None:
        return TrialResult(value=float("nan"), problem=problem, stopped=stopped)
    metric, guarantee = watch.info.main_metric, watch.info.privacy
    return TrialResult(
        value=outcome.score,
        metric=metric,
        maximize=higher_is_better(metric, watch.info.task.lower_is_better),
        is_pruned=watch.is_pruned,
        problem=problem or (f"{metric} is not a number" if outcome.score != outcome.score else ""),
        stopped=stopped,
        delta=guarantee.get("delta"),
    )
