"""Resume a run that was stopped, with the result of an uninterrupted run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER
from fedlearn.callbacks.run_history import truncate_history
from fedlearn.core import checkpoint
from fedlearn.core.command_line import DONE, UsageError
from fedlearn.core.records import ServerState
from fedlearn.errors import did_you_mean
from fedlearn.runner.callbacks import build_callbacks
from fedlearn.runner.compat import parse_override
from fedlearn.runner.config import Experiment, build_plan
from fedlearn.runner.environment import set_environment
from fedlearn.runner.initial_weights import first_state
from fedlearn.runner.rounds import RunOutcome, run_rounds
from fedlearn.runner.run_config import read_run_config, write_run_config
from fedlearn.runner.run_description import build_run_info
from fedlearn.runner.run_folder import locked_run_folder
from fedlearn.runner.run_mode import SIMULATION, RunMode

EARLY_STOP_SETTINGS = ("early_stop.metric", "early_stop.patience", "early_stop.min_delta")
CHANGEABLE_SETTINGS = ("rounds", "max_failures", "checkpoint_every", "report", *EARLY_STOP_SETTINGS)
SUMMARY_FILE = "summary.json"


def resume(folder: Path, overrides: Sequence[str] = (), *, run_mode: RunMode = SIMULATION) -> RunOutcome:
    """Resume a run from its newest checkpoint.

    Args:
        folder: run folder.
        overrides: ``setting=value`` words, only for `CHANGEABLE_SETTINGS` and callbacks.
        run_mode: simulation or deployment.

    *Guarantees*: the final parameters are equal to the parameters of an uninterrupted run, bit for bit.

    Raises:
        FedlearnError: the folder holds no run, the run is in progress, or an override is not allowed; or no checkpoint
            is complete and of the present format.
    """
    checkpoint.check_format(folder / CHECKPOINT_FOLDER)
    cfg = _changed(read_run_config(folder), overrides)
    run_mode.check_settings(cfg)
    planned, callbacks = build_plan(cfg), build_callbacks(cfg)
    set_environment(cfg.get("framework"))
    with locked_run_folder(folder):
        made = run_mode.build_experiment(cfg, planned, folder)
        state = _last_state(made, cfg, folder)
        why = _complete(made, cfg, folder, state, overrides)
        if why:
            made.engine.close()
            sys.stdout.write(f"{folder} is complete: {why}\n")
            return RunOutcome(exit_code=DONE)
        if overrides:
            write_run_config(folder, cfg)
        (folder / SUMMARY_FILE).unlink(missing_ok=True)  # it describes a run that ended earlier
        history = truncate_history(folder, state.round)
        run = build_run_info(made, cfg, folder, run_mode=run_mode, start_round=state.round, history=history)
        return run_rounds(made, run, state, callbacks, run_mode=run_mode)


def _changed(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    for word in words:
        try:
            (override,) = parse_override(word)
        except HydraException as error:
            raise UsageError(f"{word} cannot be read\n  expected  setting=value\n  try       rounds=100") from error
        key = override.setting
        if key not in CHANGEABLE_SETTINGS and not _is_callback(cfg, word, key):
            raise UsageError(_refusal(cfg, word, key))
        OmegaConf.update(cfg, key, override.value, force_add=True)
    return cfg


def _is_callback(cfg: DictConfig, word: str, key: str) -> bool:
    """Return whether the override concerns a callback of the run, or adds one (``+callbacks.mine._target_=...``)."""
    group, _, rest = key.partition(".")
    return group == "callbacks" and bool(rest) and (rest.split(".")[0] in cfg.get(group, {}) or word.startswith("+"))


def _refusal(cfg: DictConfig, word: str, key: str) -> str:
    callbacks = [f"callbacks.{name}" for name in cfg.get("callbacks", {})]
    may = f"  expected  one of {', '.join([*CHANGEABLE_SETTINGS, *callbacks])}"
    if key == "callbacks":
        return f"{word} is only for a new run\n{may}\n  try       +callbacks.mine._target_=my_code.MyTracker"
    if OmegaConf.select(cfg, key) is not None:
        return (
            f"{word} would make the rounds to come another experiment than those already done\n{may}\n"
            f"  try       python -m simulations.run ... {word}   (a new run)"
        )
    near = did_you_mean(key, [*CHANGEABLE_SETTINGS, *callbacks])
    return f"{word} is not a setting" + (f"\n  did you mean {near}?" if near else "") + f"\n{may}"


def _last_state(made: Experiment, cfg: DictConfig, folder: Path) -> ServerState:
    """Return the state of the newest whole checkpoint, or the first state if there is no checkpoint."""
    checkpoints = folder / CHECKPOINT_FOLDER
    if not any(checkpoints.glob("round_*")):
        sys.stdout.write("no checkpoint yet: starting from the beginning\n")
        return first_state(made, cfg)
    state, memories, damaged = checkpoint.load_latest(checkpoints, made.engine.layout)
    for line in damaged:
        sys.stdout.write(f"passed over: {line}\n")
    made.engine.client_states.update(memories)
    return state


def _complete(
    made: Experiment, cfg: DictConfig, folder: Path, state: ServerState, overrides: Sequence[str]
) -> str | None:
    """Return why nothing is left to do; None for a run that was stopped, even between last round and summary."""
    summary = _summary(folder)
    if summary.get("rounds") != state.round:
        return None
    changed = any(word.lstrip("+~").startswith(("early_stop.", "callbacks.")) for word in overrides)
    if summary.get("status") == "early_stopped" and not changed:  # if changed, the callbacks decide at the start
        has_metric = OmegaConf.select(cfg, "early_stop.metric") is not None
        fix = "early_stop.metric=null, or more early_stop.patience" if has_metric else "callbacks.NAME=null"
        return f"{summary['reason']}\n  try       {fix}"
    protection = made.plan.strategy.privacy_guarantee
    if summary.get("status") == "budget_exhausted" and protection and protection.max_epsilon == _budget(summary):
        return f"{summary['reason']}\n  try       a new run with more noise, or a larger privacy.epsilon"
    if state.round >= made.plan.schedule.rounds and summary.get("status") == "done":
        return f"all {state.round} rounds are done\n  try       rounds={2 * state.round}   (to go on for longer)"
    return None


def _budget(summary: dict[str, Any]) -> Any:
    return (summary.get("privacy") or {}).get("budget")


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
