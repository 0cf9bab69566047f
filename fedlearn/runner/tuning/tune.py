"""Tune the settings of a run: check them, run the default and the trials, and write the results."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedlearn.callbacks.formatting import format_metric
from fedlearn.errors import FedlearnError, require
from fedlearn.privacy.mechanisms.base import Mechanism
from fedlearn.runner.environment import set_environment
from fedlearn.runner.interrupt import Interrupt
from fedlearn.runner.plan import Plan, build_plan
from fedlearn.runner.run_folder import free_name
from fedlearn.runner.tuning.privacy_total import read_charges, total_privacy
from fedlearn.runner.tuning.results import TuningResult, write_results
from fedlearn.runner.tuning.search_space import SearchSpace, parse_space
from fedlearn.runner.tuning.study import (
    DEFAULT,
    QUIET,
    Trial,
    Tuning,
    check_folder,
    import_optuna,
    run_all_seeds,
    run_study,
)
from fedlearn.runner.tuning.trial_run import TrialResult, compose_trial

SEARCH_SETTINGS = {"trials": "30", "jobs": "1", "sampler_seed": "0", "prune": "auto", "folder": ""}  # name -> default
WITHOUT_EPSILON = ("none", "secagg")  # kinds of mechanisms that add no noise


class TuningFailed(FedlearnError):
    """No trial of a tuning has a value."""

    exit_code = 3


def tune_command(overrides: Sequence[str], config_dir: Path | None = None) -> int:
    """Run the command. Return the exit code 0, 2 for a wrong setting, or 3 if no trial has a value."""
    words = {name: text for name in SEARCH_SETTINGS if (text := _last(overrides, name)) is not None}
    rest = [text for text in overrides if text.partition("=")[0] not in SEARCH_SETTINGS]
    result = tune(rest, config_dir=config_dir, show=True, **_typed(words))
    sys.stdout.write(result.text)
    return 0


def tune(
    overrides: Sequence[str],
    *,
    trials: int = 30,
    jobs: int = 1,
    sampler_seed: int = 0,
    prune: bool | None = None,
    folder: str | Path | None = None,
    config_dir: str | Path | None = None,
    show: bool = True,
) -> TuningResult:
    """Search the best values of settings with Optuna, by the main metric after the last round.

    The first run has the default values of the searched settings. Each trial is a run with values from a
    tree-structured Parzen estimator. A second call with the same folder continues the search.

    Args:
        overrides: settings ``name=value`` as for ``simulations.run``. At least one value is a range:
            ``uniform(low,high)``, ``loguniform(low,high)``, ``integer(low,high)`` or ``choice(a,b,...)``. With
            ``seed=1,2,3``, each trial has a run with each seed, and its value is their mean.
        trials: number of trials, including an earlier call, >= 1; default 30.
        jobs: number of trials at the same time, each in a process, >= 1; default 1.
        sampler_seed: seed of the search, >= 0; default 0. All trials have the same setting ``seed``.
        prune: True ends trials whose values are worse than the median of earlier trials, in the run with the first
            seed. None, the default, is True without privacy. With privacy, an end that depends on results has no
            accounting, and True is refused.
        folder: folder of the tuning; None is a new folder below ``outputs/tune``.
        config_dir: folder with options of the user.
        show: True prints a line for each trial.

    Returns:
        The best values, all trials, the importance of the settings, and the privacy loss of all runs together.

    Raises:
        UsageError: a range is wrong, or a setting does not exist.
        SettingError: a value of a range is wrong for its setting.
        MissingExtra: Optuna is not installed.
        TuningFailed: no trial has a value.

    *Guarantees*: with ``jobs=1``, a continued search has the same trials as an uninterrupted search.

    Reference: Akiba et al., *Optuna: A Next-generation Hyperparameter Optimization Framework*, KDD 2019; Bergstra et
    al., *Algorithms for Hyper-Parameter Optimization*, NeurIPS 2011.
    """
    import_optuna()
    config = None if config_dir is None else str(Path(config_dir).absolute())
    space = parse_space(overrides)
    expected = "one mechanism, because a run without noise has no privacy guarantee"
    require("privacy" not in space.ranges, "privacy", "a range", expected, "privacy=central")
    cfg, plan = _check_corners(space, config)
    chosen = Path(folder) if folder else _new_folder(cfg)
    tuning = Tuning(
        space=space,
        folder=chosen,
        trials=trials,
        jobs=jobs,
        seed=sampler_seed,
        prune=_prunes(prune, plan.privacy),
        config_dir=config,
    )
    set_environment(cfg.get("framework"))
    check_folder(tuning)
    tell = sys.stdout.write if show else (lambda text: 0)
    tell(f"tuning of {', '.join(space.ranges)}: {trials} trials in {chosen}\n")
    with Interrupt(at_once=True) as interrupt:
        default = _default(tuning)
    if interrupt.is_requested:
        raise KeyboardInterrupt
    tell(f"default values: {default.metric} {format_metric(default.metric, default.value)}\n")
    if default.delta is not None:
        tell("each run is charged: the privacy loss of the tuning is that of all runs together\n")
    progress = _Progress(default, tell)
    study = run_study(tuning, default, progress)
    result = write_results(tuning, study, default, _privacy(tuning, default))
    if result.best is None:
        raise TuningFailed(f"no trial has a value: {progress.problem}\n  see       {chosen}")
    return result


def _last(overrides: Sequence[str], name: str) -> str | None:
    texts = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == name]
    return texts[-1] if texts else None


def _typed(words: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the words of the command.

    Raises:
        SettingError: a value has another type.
    """
    values: dict[str, Any] = {}
    for name, text in words.items():
        if name == "folder":
            values[name] = text
        elif name == "prune":
            known = {"true": True, "false": False, "auto": None}
            require(text in known, name, text, "true, false or auto", "prune=false")
            values[name] = known[text]
        else:
            require(
                re.fullmatch(r"\d+", text) is not None, name, text, "a whole number", f"{name}={SEARCH_SETTINGS[name]}"
            )
            values[name] = int(text)
    return values


def _check_corners(space: SearchSpace, config_dir: str | None) -> tuple[DictConfig, Plan]:
    """Check both ends of each range, or all its choices. Return configuration and plan with default values.

    Raises:
        FedlearnError: a setting does not exist, or a value is wrong.
    """
    cfg = compose_trial([*space.fixed, *QUIET], config_dir).cfg
    plan = build_plan(cfg)
    for further in space.runs:
        build_plan(compose_trial([*space.fixed, *further], config_dir).cfg)
    for name, values in space.ranges.items():
        for text in values.corners:
            build_plan(compose_trial(space.overrides({name: text}), config_dir).cfg)
    return cfg, plan


def _prunes(prune: bool | None, privacy: Mechanism) -> bool:
    has_epsilon = privacy.kind not in WITHOUT_EPSILON
    expected = "false with privacy, because the accounting does not cover an end that depends on results"
    require(not (prune and has_epsilon), "prune", prune, expected, "prune=false")
    return not has_epsilon if prune is None else prune


def _new_folder(cfg: DictConfig) -> Path:
    return free_name(Path("outputs", "tune", str(cfg.get("run_name", "run")), f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))


def _default(tuning: Tuning) -> TrialResult:
    """Return the result of the run with default values, from an earlier call or from a new run.

    Raises:
        FedlearnError: the run has no value.
    """
    folder = tuning.folder / DEFAULT
    saved = TrialResult.read(folder)
    if saved is not None:
        return saved
    result = run_all_seeds(tuning, DEFAULT, {})
    if result.stopped:
        raise KeyboardInterrupt
    if result.problem:
        raise FedlearnError(f"the run with default values failed: {result.problem}")
    result.write(folder)
    return result


class _Progress:
    """Print one line for each trial."""

    def __init__(self, default: TrialResult, tell: Any) -> None:
        self._default, self._tell = default, tell
        self._best = default.value
        self.problem = ""

    def __call__(self, trial: Trial) -> None:
        result, metric = trial.result, self._default.metric
        values = " ".join(
            f"{name}={value if isinstance(value, str) else f'{value:.4g}'}" for name, value in trial.values.items()
        )
        if result.problem:
            self.problem = result.problem
            outcome = f"failed: {result.problem.splitlines()[0]}"
        else:
            outcome = f"{metric} {format_metric(metric, result.value)}" + (", pruned" if result.is_pruned else "")
            better = result.value > self._best if self._default.maximize else result.value < self._best
            if better and not result.is_pruned:
                self._best, outcome = result.value, f"{outcome}, best"
        self._tell(f"trial {trial.number}: {outcome}  ({values}, {trial.seconds:.1f} s)\n")


def _privacy(tuning: Tuning, default: TrialResult) -> Any:
    return None if default.delta is None else total_privacy(read_charges(tuning.folder), delta=default.delta)
