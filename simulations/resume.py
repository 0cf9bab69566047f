"""``python -m simulations.resume FOLDER``: go on with a run that was stopped, to the end it would have had."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from fedlearn import checkpoint
from fedlearn.config import Experiment, plan
from fedlearn.errors import did_you_mean
from fedlearn.history import History, read_history, resume_from
from fedlearn.hydra_compat import parse_override
from fedlearn.loop import start
from fedlearn.records import State
from simulations.describe import describe
from simulations.exits import DONE, exit_code
from simulations.folder import at_work
from simulations.interrupt import terminate_as_interrupt
from simulations.overrides import UsageError
from simulations.recipe import read_recipe, write_recipe
from simulations.rounds import CHECKPOINTS, Outcome, conduct
from simulations.run import set_environment
from simulations.venue import HERE, Venue

EARLY_STOP = ("early_stop.metric", "early_stop.patience", "early_stop.min_delta")
MAY_CHANGE = ("rounds", "max_failures", "checkpoint_every", "report", *EARLY_STOP)
SUMMARY = "summary.json"


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as those of ``simulations.run``."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.resume",
        description="Goes on with a run from its last checkpoint, in the same folder, to the same result.",
        epilog=f"settings that may change: {', '.join(MAY_CHANGE)}",
    )
    parser.add_argument("folder", type=Path, help="what the run named as saved")
    parser.add_argument("settings", nargs="*", help="e.g. rounds=100 to go on for longer")
    args = parser.parse_args(words)
    terminate_as_interrupt()
    return exit_code(lambda: resume(args.folder, args.settings).exit_code)


def resume(folder: Path, changes: Sequence[str] = (), *, venue: Venue = HERE) -> Outcome:
    """Go on with a run.

    Args:
        folder: of the run.
        changes: ``setting=value`` words, of `MAY_CHANGE` only.
        venue: where it takes place.

    *Guarantees*: the final parameters are those of an uninterrupted run, bit for bit, wherever it was stopped.

    Raises:
        FedlearnError: the folder holds no run, or one that is still going; its checkpoints are all damaged; a change
            would falsify what was done so far.
    """
    cfg = _changed(read_recipe(folder), changes)
    planned = plan(cfg)
    set_environment(cfg)
    with at_work(folder):
        made = venue.build(cfg, planned, folder)
        state = _last_state(made, folder)
        why = _complete(made, folder, state)
        if why:
            made.engine.close()
            sys.stdout.write(f"{folder} is complete: {why}\n")
            return Outcome(exit_code=DONE)
        if changes:
            write_recipe(folder, cfg)
        (folder / SUMMARY).unlink(missing_ok=True)  # it tells of a run that ends elsewhere
        history = resume_from(folder, state.round)
        run = describe(made, cfg, folder, again=venue.again(folder), start_round=state.round, history=history)
        return conduct(made, run, state, report=bool(cfg.get("report", True)), venue=venue)


def _changed(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    for word in words:
        try:
            (override,) = parse_override(word)
        except HydraException as error:
            raise UsageError(f"{word} cannot be read\n  expected  setting=value\n  try       rounds=100") from error
        key = override.setting
        if key not in MAY_CHANGE:
            raise UsageError(_refusal(cfg, word, key))
        OmegaConf.update(cfg, key, override.value)
    return cfg


def _refusal(cfg: DictConfig, word: str, key: str) -> str:
    may = f"  expected  one of {', '.join(MAY_CHANGE)}"
    if OmegaConf.select(cfg, key) is not None:
        return (
            f"{word} would make the rounds to come another experiment than those already done\n{may}\n"
            f"  try       python -m simulations.run ... {word}   (a new run)"
        )
    near = did_you_mean(key, MAY_CHANGE)
    return f"{word} is not a setting" + (f"\n  did you mean {near}?" if near else "") + f"\n{may}"


def _last_state(made: Experiment, folder: Path) -> State:
    """From the newest whole checkpoint, or the beginning if the run was stopped before its first one."""
    checkpoints = folder / CHECKPOINTS
    if not any(checkpoints.glob("round_*")):
        seed = made.plan.seed
        sys.stdout.write("no checkpoint yet: starting from the beginning\n")
        return start(made.plan.strategy, made.scenario.trainer.init(seed), made.engine, seed=seed)
    state, memories, damaged = checkpoint.newest(checkpoints, made.engine.layout)
    for line in damaged:
        sys.stdout.write(f"passed over: {line}\n")
    made.engine.memories.update(memories)
    return state


def _complete(made: Experiment, folder: Path, state: State) -> str | None:
    """Why there is nothing left to do; None for a run that was stopped, even between its last round and its summary."""
    summary = _summary(folder)
    if summary.get("rounds") != state.round:
        return None
    history: History = [line for line in read_history(folder) if line["round"] <= state.round]
    early = made.early_stop and made.early_stop.reason(history)
    if early and summary.get("status") == "early_stopped":
        return f"{early}\n  try       early_stop.metric=null, or more early_stop.patience"
    protection = made.plan.strategy.protection
    if summary.get("status") == "budget_exhausted" and protection and protection.budget == _budget(summary):
        return f"{summary['reason']}\n  try       a new run with more noise, or a larger privacy.epsilon"
    if state.round >= made.plan.schedule.rounds and summary.get("status") == "done":
        return f"all {state.round} rounds are done\n  try       rounds={2 * state.round}   (to go on for longer)"
    return None


def _budget(summary: dict[str, Any]) -> Any:
    return (summary.get("privacy") or {}).get("budget")


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
