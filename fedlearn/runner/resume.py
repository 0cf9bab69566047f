"""Resume a stopped run. Its final model is equal to the model of an uninterrupted run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from fedlearn.advice import label
from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER
from fedlearn.callbacks.run_history import truncate_history
from fedlearn.core import checkpoint
from fedlearn.core.command_line import DONE, UsageError
from fedlearn.core.records import ServerState
from fedlearn.errors import FedlearnError, did_you_mean
from fedlearn.runner.callbacks import build_callbacks
from fedlearn.runner.compat import parse_override
from fedlearn.runner.dry_run import refuse_dry_run
from fedlearn.runner.environment import set_environment
from fedlearn.runner.experiment import Experiment
from fedlearn.runner.initial_weights import first_state
from fedlearn.runner.ledger_file import LedgerFile
from fedlearn.runner.model_folder import with_declared_model, write_model_folder
from fedlearn.runner.plan import build_plan
from fedlearn.runner.rounds import RunOutcome, run_rounds
from fedlearn.runner.run_config import read_run_config, write_run_config
from fedlearn.runner.run_description import build_run_info
from fedlearn.runner.run_folder import locked_run_folder
from fedlearn.runner.run_mode import SIMULATION, RunMode
from fedlearn.runner.training_data import require_same_data

EARLY_STOP_SETTINGS = ("early_stop.metric", "early_stop.patience", "early_stop.min_delta")
CHANGEABLE_SETTINGS = (
    "rounds",
    "max_failures",
    "min_sites",
    "checkpoint_every",
    "report",
    "num_cores",
    *EARLY_STOP_SETTINGS,
)
SUMMARY_FILE = "summary.json"


def resume(folder: Path, overrides: Sequence[str] = (), *, run_mode: RunMode = SIMULATION) -> RunOutcome:
    """Resume a run from its newest checkpoint.

    Args:
        folder: run folder.
        overrides: overrides ``setting=value`` of `CHANGEABLE_SETTINGS` and callbacks.
        run_mode: simulation or deployment.

    *Guarantees*: the final parameters are equal to the parameters of an uninterrupted run, bit for bit.

    Raises:
        FedlearnError: the folder is not a run folder, the run is in progress, or an override is not allowed.
        CheckpointError: no checkpoint is complete, or the checkpoints have an older format.
        DataError: the training data have changed.
    """
    checkpoint.check_format(folder / CHECKPOINT_FOLDER)
    cfg = _apply_overrides(read_run_config(folder), overrides)
    run_mode.check_settings(cfg)
    refuse_dry_run(cfg, "a resumed run")
    plan, callbacks = build_plan(cfg, run_mode.parts), build_callbacks(cfg, run_mode.parts.callbacks)
    set_environment(cfg.get("framework"), cfg.get("num_cores"), device=cfg.get("device") or "cpu")
    with locked_run_folder(folder):
        experiment = with_declared_model(run_mode.build_experiment(cfg, plan, folder), cfg)
        _check_data(folder, experiment)
        state = LedgerFile(folder).restore(_last_state(experiment, cfg, folder))
        reason = _reason_complete(experiment, cfg, folder, state, overrides)
        if reason:
            experiment.engine.close()
            sys.stdout.write(f"{folder} is complete: {reason}\n")
            return RunOutcome(exit_code=DONE, folder=folder)
        if overrides:
            write_run_config(folder, cfg)
        write_model_folder(folder, experiment, cfg)
        (folder / SUMMARY_FILE).unlink(missing_ok=True)  # it describes the earlier end of the run
        history = truncate_history(folder, state.round)
        run = build_run_info(experiment, cfg, folder, run_mode=run_mode, start_round=state.round, history=history)
        return run_rounds(experiment, run, state, callbacks, run_mode=run_mode)


def _check_data(folder: Path, experiment: Experiment) -> None:
    try:
        require_same_data(folder, experiment.scenario)
    except FedlearnError:
        experiment.engine.close()
        raise


def _apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        try:
            (override,) = parse_override(text)
        except HydraException as error:
            raise UsageError(f"{text} cannot be read\n  expected  setting=value\n  try       rounds=100") from error
        key = override.setting
        if key not in CHANGEABLE_SETTINGS and not _is_callback(cfg, text, key):
            raise UsageError(_refusal(cfg, text, key))
        OmegaConf.update(cfg, key, override.value, force_add=True)
    return cfg


def _is_callback(cfg: DictConfig, override: str, key: str) -> bool:
    """Return whether the override changes a callback of the run, or adds one (``+callbacks.mine._target_=...``)."""
    group, _, rest = key.partition(".")
    return (
        group == "callbacks" and bool(rest) and (rest.split(".")[0] in cfg.get(group, {}) or override.startswith("+"))
    )


def _refusal(cfg: DictConfig, override: str, key: str) -> str:
    callbacks = [f"callbacks.{name}" for name in cfg.get("callbacks", {})]
    expected = f"  expected  one of {', '.join([*CHANGEABLE_SETTINGS, *callbacks])}"
    if key == "callbacks":
        fix = "+callbacks.mine._target_=my_code.MyTracker"
        return f"{override} is possible only for a new run\n{expected}\n  try       {fix}"
    if OmegaConf.select(cfg, key) is not None:
        return (
            f"{override} cannot change in a resumed run, because the completed rounds had another value\n{expected}\n"
            f"  advice    start a new run with {override}"
        )
    near = did_you_mean(key, [*CHANGEABLE_SETTINGS, *callbacks])
    return f"{override} is not a setting" + (f"\n  did you mean {near}?" if near else "") + f"\n{expected}"


def _last_state(experiment: Experiment, cfg: DictConfig, folder: Path) -> ServerState:
    """Return the state of the newest complete checkpoint, or the initial state without a checkpoint."""
    checkpoints = folder / CHECKPOINT_FOLDER
    if not any(checkpoints.glob("round_*")):
        sys.stdout.write("no checkpoint yet: the run starts from the first round\n")
        return first_state(experiment, cfg)
    state, client_states, damaged = checkpoint.load_latest(checkpoints, experiment.engine.layout)
    for line in damaged:
        sys.stdout.write(f"skipped: {line}\n")
    experiment.engine.client_states.update(client_states)
    return state


def _reason_complete(
    experiment: Experiment, cfg: DictConfig, folder: Path, state: ServerState, overrides: Sequence[str]
) -> str | None:
    """Return the reason that a run is complete, and one thing to try; None if rounds or the summary are missing."""
    summary = _summary(folder)
    if summary.get("rounds") != state.round:
        return None
    changed = any(text.lstrip("+~").startswith(("early_stop.", "callbacks.")) for text in overrides)
    if summary.get("status") == "early_stopped" and not changed:  # changed callbacks decide at their start
        has_metric = OmegaConf.select(cfg, "early_stop.metric") is not None
        fix = (
            "early_stop.metric=null" if has_metric else "remove the callback that stopped the run: callbacks.NAME=null"
        )
        return f"{summary['reason']}\n{label(fix)}"
    guarantee = experiment.plan.strategy.privacy_guarantee
    if summary.get("status") == "budget_exhausted" and guarantee and guarantee.max_epsilon == _budget(summary):
        return f"{summary['reason']}\n  advice    a new run with more noise, or a larger privacy.epsilon"
    if state.round >= experiment.plan.schedule.rounds and summary.get("status") == "done":
        return f"all {state.round} rounds are done\n  try       rounds={2 * state.round}"
    return None


def _budget(summary: dict[str, Any]) -> Any:
    return (summary.get("privacy") or {}).get("budget")


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
