"""Run the rounds of an experiment, call its callbacks, and write the summary."""

from __future__ import annotations

import hashlib
import logging
import sys
from bdb import BdbQuit
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.callback_list import CallbackError, CallbackList
from fedlearn.callbacks.console import Console
from fedlearn.callbacks.formatting import describe_failure
from fedlearn.callbacks.judgement import last_confusion
from fedlearn.callbacks.run_files import RunFiles, write_summary
from fedlearn.callbacks.run_history import History, final_metrics, totals
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.summary import summarise
from fedlearn.core.arrays import as_numpy
from fedlearn.core.command_line import DONE, FAILED, STOPPED
from fedlearn.core.records import Round, ServerState
from fedlearn.errors import FedlearnError, TooManyFailures
from fedlearn.loop.scenario import judge
from fedlearn.loop.training_loop import federate
from fedlearn.runner.baselines import train_baselines
from fedlearn.runner.callbacks import REQUIRED
from fedlearn.runner.evaluation import write_evaluation
from fedlearn.runner.experiment import Experiment
from fedlearn.runner.interrupt import Interrupt
from fedlearn.runner.ledger_file import LedgerFile
from fedlearn.runner.run_folder import RunFolderWriteError
from fedlearn.runner.run_mode import SIMULATION, RunMode
from fedlearn.runner.training_check import MovementCheck

EXIT_CODES = {"done": DONE, "early_stopped": DONE, "budget_exhausted": DONE, "stopped": STOPPED, "failed": FAILED}
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunEnding:
    """Status and state at the end of the rounds.

    Attributes:
        status: ``done``, ``early_stopped``, ``budget_exhausted``, ``stopped`` or ``failed``.
        state: server state after the last completed round.
        reason: cause of an early end; empty otherwise.
    """

    status: str
    state: ServerState
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """Exit code of a run, and its main metric at the last evaluation (NaN without an evaluation).

    Attributes:
        exit_code: exit code of the command.
        score: main metric at the last evaluation.
        folder: run folder; None if the run has none.
        reason: cause of an early end; empty otherwise.
        metric: name of the main metric; empty without rounds.
    """

    exit_code: int
    score: float = float("nan")
    folder: Path | None = None
    reason: str = ""
    metric: str = ""


def run_rounds(
    experiment: Experiment,
    run: RunInfo,
    state: ServerState,
    callbacks: Mapping[str, Callback],
    *,
    run_mode: RunMode = SIMULATION,
) -> RunOutcome:
    """Run the rounds after ``state``, call the callbacks, and write the summary.

    Args:
        experiment: data, strategy and engine. The engine is closed at the end.
        run: description of the run.
        state: server state before the next round.
        callbacks: name -> callback, from `fedlearn.runner.callbacks.build_callbacks`.
        run_mode: simulation or deployment.

    Raises:
        RunFolderWriteError: the run folder can no longer be written. Its last checkpoint remains.
        CallbackError: a callback with ``ends_run_on_error`` failed at the start or at the end.
        KeyboardInterrupt: the user pressed Ctrl-C twice.
    """
    files = callbacks["files"]
    assert isinstance(files, RunFiles)
    callback_list = CallbackList(_for_mode(callbacks, run_mode))
    try:
        with Interrupt() as interrupt:  # includes the end, so that Ctrl-C does not prevent the summary
            ending = _run(experiment, run, state, callback_list, interrupt)
            baselines = _baselines(experiment, ending, files.history, interrupt)
            summary = _summary(run, ending, files.history, baselines)
            if ending.status not in ("stopped", "failed"):
                confusion_CC = last_confusion(files.history)
                write_evaluation(run.folder, experiment, ending.state, confusion_CC=confusion_CC)
            callback_list.on_end(summary)
    except CallbackError as error:
        if not _is_write_error(error):
            raise
        log.exception("the run folder cannot be written")
        raise _write_error(error, run) from error.__cause__
    finally:
        callback_list.close()
    if callback_list.failures:  # write again, because callbacks can fail after the first summary
        with suppress(OSError):  # the first summary lacks only these failures, which run.log has
            write_summary(run.folder, callback_list.add_failures(summary))
    value = final_metrics(files.history).get(run.main_metric)
    return RunOutcome(
        exit_code=EXIT_CODES[ending.status],
        score=float("nan") if value is None else value,
        folder=run.folder,
        reason=ending.reason,
        metric=run.main_metric,
    )


def parameters_sha256(state: ServerState) -> str:
    """Return the SHA-256 digest of the model. Models have equal digests if their parameters are equal bit for bit."""
    return hashlib.sha256(as_numpy(state.params_D).astype(np.float32).tobytes()).hexdigest()


def _for_mode(callbacks: Mapping[str, Callback], run_mode: RunMode) -> dict[str, Callback]:
    """Return the callbacks of a run mode. In a deployment, the console draws for the terminal of the submitter."""
    if run_mode.create_console is None or not isinstance(callbacks.get("console"), Console):
        return dict(callbacks)
    return {**callbacks, "console": run_mode.create_console()}


def _run(
    experiment: Experiment, run: RunInfo, state: ServerState, callbacks: CallbackList, interrupt: Interrupt
) -> RunEnding:
    try:
        return _rounds(experiment, run, state, callbacks, interrupt)
    finally:
        experiment.engine.close()


def _rounds(
    experiment: Experiment, run: RunInfo, state: ServerState, callbacks: CallbackList, interrupt: Interrupt
) -> RunEnding:
    plan, engine = experiment.plan, experiment.engine
    trainer = experiment.evaluation_trainer or experiment.scenario.trainer
    evaluate = judge(replace(experiment.scenario, trainer=trainer))
    reason, exhausted = callbacks.on_start(run), None
    known = experiment.model_report.unused
    check_movement = MovementCheck(plan.strategy, engine.layout, state, plan.schedule.rounds, known=known)
    rounds = federate(
        plan.strategy,
        engine,
        state,
        schedule=plan.schedule,
        local=plan.local,
        evaluate=evaluate,
        journal=LedgerFile(run.folder),
    )
    try:
        while not (reason or interrupt.is_requested):
            try:
                round = next(rounds)
            except StopIteration as end:
                exhausted = end.value
                break
            state = round.state
            reason = callbacks.on_round(round)
            check_movement(state)
            _log_failures(round, run)
    except BdbQuit:  # the command q of a debugger
        return RunEnding(status="stopped", state=state, reason="interrupted")
    except Exception as error:
        if _is_write_error(error):
            raise
        failures = error.failures if isinstance(error, TooManyFailures) else ()
        trace = next((f"\n{failure.traceback}" for failure in failures if failure.traceback), "")
        log.exception("round %d failed%s", state.round + 1, trace)
        text = str(error) if isinstance(error, FedlearnError) else f"{type(error).__name__}: {error}"
        return RunEnding(status="failed", state=state, reason=text)
    if reason:
        return RunEnding(status="early_stopped", state=state, reason=reason)
    if exhausted:
        return RunEnding(status="budget_exhausted", state=state, reason=exhausted)
    if state.round < plan.schedule.rounds:
        return RunEnding(status="stopped", state=state, reason="interrupted")
    return RunEnding(status="done", state=state)


def _is_write_error(error: Exception) -> bool:
    required = isinstance(error, CallbackError) and error.callback in REQUIRED
    return required and isinstance(error.__cause__, OSError)


def _write_error(error: CallbackError, run: RunInfo) -> RunFolderWriteError:
    assert isinstance(error.__cause__, OSError)
    fix = f"free disk space, then {run.resume_command}"
    return RunFolderWriteError(f"{run.folder} can no longer be written: {error.__cause__.strerror}\n  advice    {fix}")


def _log_failures(round: Round, run: RunInfo) -> None:
    for failure in round.failures:
        log.warning("round %d: %s\n%s", round.number, describe_failure(failure, run), failure.traceback)


def _baselines(experiment: Experiment, ending: RunEnding, history: History, interrupt: Interrupt) -> dict[str, Any]:
    """Train the baselines of the plan. An error of a baseline does not end the run."""
    if not experiment.plan.baselines or EXIT_CODES[ending.status] != DONE:
        return {}
    updates = totals(history)["client_updates"]
    try:
        return train_baselines(experiment, num_client_updates=updates, should_stop=lambda: interrupt.is_requested)
    except Exception as error:
        log.exception("the baseline failed")
        sys.stderr.write(f" no baseline: {type(error).__name__}: {error}\n")
        return {}


def _summary(run: RunInfo, ending: RunEnding, history: History, baselines: Mapping[str, Any]) -> dict[str, Any]:
    digest = parameters_sha256(ending.state)
    summary = summarise(run, history, status=ending.status, reason=ending.reason, parameters_sha256=digest)
    return summary | ({"baselines": baselines} if baselines else {})
