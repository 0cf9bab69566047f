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

from fedlearn import checkpoint
from fedlearn.arrays import as_numpy
from fedlearn.config import Experiment
from fedlearn.engines.base import Engine
from fedlearn.errors import FedlearnError, MissingExtra
from fedlearn.history import final, summarise, totals
from fedlearn.loop import federate
from fedlearn.records import Round, State
from fedlearn.scenario import judge
from fedlearn.sinks.base import RunInfo, Sink
from fedlearn.sinks.console import Unbreakable
from fedlearn.sinks.files import RunFiles, partition_summary
from fedlearn.sinks.wording import describe as in_words
from simulations.baselines import baselines
from simulations.exits import DONE, FAILED, STOPPED
from simulations.folder import FolderLost
from simulations.interrupt import Interrupt
from simulations.venue import HERE, Venue

EXIT_CODES = {"done": DONE, "early_stopped": DONE, "budget_exhausted": DONE, "stopped": STOPPED, "failed": FAILED}
CHECKPOINTS = "checkpoints"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the rounds ended: ``done``, ``early_stopped``, ``budget_exhausted``, ``stopped`` or ``failed``, why, and the
    last state.
    """

    status: str
    state: State
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run is worth to whoever started it: an exit code, and the main metric at the end."""

    exit_code: int
    score: float = float("nan")


def conduct(experiment: Experiment, run: RunInfo, state: State, *, report: bool = True, venue: Venue = HERE) -> Outcome:
    """Run the rounds after ``state``, tell the onlookers, and sum up.

    Raises:
        FolderLost: the run folder can no longer be written; its last checkpoint stays.
        KeyboardInterrupt: at the second Ctrl-C.
    """
    data = experiment.scenario.data
    files = RunFiles(run.folder, partition=partition_summary(data) if data.num_train is None else None)
    console = Unbreakable(venue.console())
    sinks: Sequence[Sink] = (files, console)
    try:
        with Interrupt() as interrupt:  # to the very end: an interrupt must not cost a finished run its summary
            for sink in sinks:
                sink.start(run)
            ending = _rounds(experiment, run, state, files, sinks, interrupt)
            beside = _baselines(experiment, ending, files, interrupt)
            _sum_up(run, ending, files, console, beside, report=report)
            if ending.status in ("stopped", "failed"):
                console.say(f" resume    {venue.resume(run.folder)}")
    except OSError as error:
        log.exception("the run folder failed")
        fix = f"make room, then {venue.resume(run.folder)}"
        raise FolderLost(f"{run.folder} can no longer be written: {error.strerror}\n  try       {fix}") from error
    finally:
        for sink in sinks:
            sink.close()
    value = final(files.history).get(run.main)
    return Outcome(exit_code=EXIT_CODES[ending.status], score=float("nan") if value is None else value)


def _baselines(experiment: Experiment, ending: Ending, files: RunFiles, interrupt: Interrupt) -> dict[str, Any]:
    """What the run is held against; a baseline that fails costs the run nothing."""
    if not experiment.plan.baselines or EXIT_CODES[ending.status] != DONE:
        return {}
    updates = totals(files.history)["client_updates"]
    try:
        return baselines(experiment, client_updates=updates, stopped=lambda: interrupt.asked)
    except Exception as error:
        log.exception("no baseline")
        sys.stderr.write(f" no baseline: {type(error).__name__}: {error}\n")
        return {}


def _sum_up(
    run: RunInfo,
    ending: Ending,
    files: RunFiles,
    console: Unbreakable,
    beside: Mapping[str, Any],
    *,
    report: bool,
) -> None:
    digest = parameters_sha256(ending.state)
    summary = summarise(run, files.history, status=ending.status, reason=ending.reason, parameters_sha256=digest)
    summary |= {"baselines": beside} if beside else {}
    files.finish(summary)
    if report and ending.status != "stopped":
        _report(run.folder)
    console.finish(summary)


def parameters_sha256(state: State) -> str:
    """Names the model: equal for two runs exactly if every parameter is equal, bit for bit."""
    return hashlib.sha256(as_numpy(state.params_D).astype(np.float32).tobytes()).hexdigest()


def _rounds(
    experiment: Experiment, run: RunInfo, state: State, files: RunFiles, sinks: Sequence[Sink], interrupt: Interrupt
) -> Ending:
    plan, engine = experiment.plan, experiment.engine
    stop = experiment.early_stop
    evaluate = judge(experiment.scenario)
    rounds = federate(plan.strategy, engine, state, schedule=plan.schedule, local=plan.local, evaluate=evaluate)
    reason, saved = stop and stop.reason(files.history), state.round
    exhausted = None
    try:
        while not (reason or interrupt.asked):
            try:
                round = next(rounds)
            except StopIteration as end:
                exhausted = end.value
                break
            state = round.state
            for sink in sinks:  # before the checkpoint, which must not be ahead of the files
                sink.round(round)
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
        return Ending(status="failed", state=state, reason=str(error) if own else f"{type(error).__name__}: {error}")
    finally:
        engine.close()
    if reason:
        return Ending(status="early_stopped", state=state, reason=reason)
    if exhausted:
        return Ending(status="budget_exhausted", state=state, reason=exhausted)
    if state.round < plan.schedule.rounds:
        return Ending(status="stopped", state=state, reason="interrupted")
    return Ending(status="done", state=state)


def _save(run: RunInfo, state: State, engine: Engine) -> int:
    checkpoint.save(run.folder / CHECKPOINTS, state, engine.memories, layout=engine.layout)
    return state.round


def _log_failures(round: Round, run: RunInfo) -> None:
    for failure in round.failures:
        log.warning("round %d: %s\n%s", round.number, in_words(failure, run), failure.traceback)


def _report(folder: Path) -> None:
    """The report is made of files that are already safe, so its failure is not the run's."""
    try:
        from simulations.report import write_report

        write_report(folder)
    except Exception as error:
        log.exception("no report")
        sys.stderr.write(f" no report: {error if isinstance(error, MissingExtra) else f'see {folder}/run.log'}\n")
