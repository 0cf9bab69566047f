"""From the first round to the last: onlookers, checkpoints, early stopping, and how it ended."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.console import PipeSafeConsole
from fedlearn.callbacks.formatting import describe_failure as in_words
from fedlearn.callbacks.run_files import RunFiles, partition_summary
from fedlearn.callbacks.run_history import final_metrics, totals
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.summary import summarise
from fedlearn.core import checkpoint
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import Round, ServerState
from fedlearn.errors import FedlearnError, MissingExtra
from fedlearn.loop.protocols import Engine
from fedlearn.loop.scenario import judge
from fedlearn.loop.training_loop import federate
from fedlearn.runner.baselines import train_baselines
from fedlearn.runner.config import Experiment
from fedlearn.runner.exit_codes import DONE, FAILED, STOPPED
from fedlearn.runner.interrupt import Interrupt
from fedlearn.runner.run_folder import RunFolderWriteError
from fedlearn.runner.run_mode import SIMULATION, RunMode

EXIT_CODES = {"done": DONE, "early_stopped": DONE, "budget_exhausted": DONE, "stopped": STOPPED, "failed": FAILED}
CHECKPOINT_FOLDER = "checkpoints"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunEnding:
    """How the rounds ended: ``done``, ``early_stopped``, ``budget_exhausted``, ``stopped`` or ``failed``, why, and the
    last state.
    """

    status: str
    state: ServerState
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a run is worth to whoever started it: an exit code, and the main metric at the end."""

    exit_code: int
    score: float = float("nan")


def run_rounds(
    experiment: Experiment, run: RunInfo, state: ServerState, *, report: bool = True, run_mode: RunMode = SIMULATION
) -> RunOutcome:
    """Run the rounds after ``state``, tell the onlookers, and sum up.

    Raises:
        FolderLost: the run folder can no longer be written; its last checkpoint stays.
        KeyboardInterrupt: at the second Ctrl-C.
    """
    data = experiment.scenario.data
    files = RunFiles(run.folder, partition=partition_summary(data) if data.num_train is None else None)
    console = PipeSafeConsole(run_mode.create_console())
    sinks: Sequence[Callback] = (files, console)
    try:
        with Interrupt() as interrupt:  # to the very end: an interrupt must not cost a finished run its summary
            for sink in sinks:
                sink.on_run_start(run)
            ending = _rounds(experiment, run, state, files, sinks, interrupt)
            beside = _baselines(experiment, ending, files, interrupt)
            _sum_up(run, ending, files, console, beside, report=report)
            if ending.status in ("stopped", "failed"):
                console.write_line(f" resume    {run_mode.resume_command(run.folder)}")
    except OSError as error:
        log.exception("the run folder failed")
        fix = f"make room, then {run_mode.resume_command(run.folder)}"
        raise RunFolderWriteError(
            f"{run.folder} can no longer be written: {error.strerror}\n  try       {fix}"
        ) from error
    finally:
        for sink in sinks:
            sink.close()
    value = final_metrics(files.history).get(run.main_metric)
    return RunOutcome(exit_code=EXIT_CODES[ending.status], score=float("nan") if value is None else value)


def _baselines(experiment: Experiment, ending: RunEnding, files: RunFiles, interrupt: Interrupt) -> dict[str, Any]:
    """What the run is held against; a baseline that fails costs the run nothing."""
    if not experiment.plan.baselines or EXIT_CODES[ending.status] != DONE:
        return {}
    updates = totals(files.history)["client_updates"]
    try:
        return train_baselines(experiment, num_client_updates=updates, should_stop=lambda: interrupt.is_requested)
    except Exception as error:
        log.exception("no baseline")
        sys.stderr.write(f" no baseline: {type(error).__name__}: {error}\n")
        return {}


def _sum_up(
    run: RunInfo,
    ending: RunEnding,
    files: RunFiles,
    console: PipeSafeConsole,
    beside: Mapping[str, Any],
    *,
    report: bool,
) -> None:
    digest = parameters_sha256(ending.state)
    summary = summarise(run, files.history, status=ending.status, reason=ending.reason, parameters_sha256=digest)
    summary |= {"baselines": beside} if beside else {}
    files.on_run_end(summary)
    if report and ending.status != "stopped":
        _report(run.folder)
    console.on_run_end(summary)


def parameters_sha256(state: ServerState) -> str:
    """Names the model: equal for two runs exactly if every parameter is equal, bit for bit."""
    return hashlib.sha256(as_numpy(state.params_D).astype(np.float32).tobytes()).hexdigest()


def _rounds(
    experiment: Experiment,
    run: RunInfo,
    state: ServerState,
    files: RunFiles,
    sinks: Sequence[Callback],
    interrupt: Interrupt,
) -> RunEnding:
    plan, engine = experiment.plan, experiment.engine
    stop = experiment.early_stop
    evaluate = judge(experiment.scenario)
    rounds = federate(plan.strategy, engine, state, schedule=plan.schedule, local=plan.local, evaluate=evaluate)
    reason, saved = stop and stop.reason(files.history), state.round
    exhausted = None
    try:
        while not (reason or interrupt.is_requested):
            try:
                round = next(rounds)
            except StopIteration as end:
                exhausted = end.value
                break
            state = round.state
            for sink in sinks:  # before the checkpoint, which must not be ahead of the files
                sink.on_round_end(round)
            _log_failures(round, run)
            reason = stop and stop.reason(files.history)
            if round.number % plan.checkpoint_every == 0:
                saved = _save(run, state, engine)
        if saved < state.round:  # however it came to be the last
            _save(run, state, engine)
    except OSError:
        raise
    except Exception as error:
        log.exception("round %d failed", state.round + 1)
        own = isinstance(error, FedlearnError)
        return RunEnding(status="failed", state=state, reason=str(error) if own else f"{type(error).__name__}: {error}")
    finally:
        engine.close()
    if reason:
        return RunEnding(status="early_stopped", state=state, reason=reason)
    if exhausted:
        return RunEnding(status="budget_exhausted", state=state, reason=exhausted)
    if state.round < plan.schedule.rounds:
        return RunEnding(status="stopped", state=state, reason="interrupted")
    return RunEnding(status="done", state=state)


def _save(run: RunInfo, state: ServerState, engine: Engine) -> int:
    checkpoint.save(run.folder / CHECKPOINT_FOLDER, state, engine.client_states, layout=engine.layout)
    return state.round


def _log_failures(round: Round, run: RunInfo) -> None:
    for failure in round.failures:
        log.warning("round %d: %s\n%s", round.number, in_words(failure, run), failure.traceback)


def _report(folder: Path) -> None:
    """The report is made of files that are already safe, so its failure is not the run's."""
    try:
        from fedlearn.callbacks.report import write_report

        write_report(folder)
    except Exception as error:
        log.exception("no report")
        sys.stderr.write(f" no report: {error if isinstance(error, MissingExtra) else f'see {folder}/run.log'}\n")
