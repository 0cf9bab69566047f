"""Run an experiment from a script or a notebook: `fedlearn.run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.notebook import NotebookTable, in_notebook
from fedlearn.core.command_line import FAILED
from fedlearn.errors import require
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.mechanisms.base import Mechanism
from fedlearn.runner.compat import command_line_parser
from fedlearn.runner.compose import Job, compose, with_custom_targets
from fedlearn.runner.dry_run import refuse_dry_run
from fedlearn.runner.engines import require_in_process
from fedlearn.runner.instantiation import allowed_modules
from fedlearn.runner.parts import KINDS, Parts, object_settings
from fedlearn.runner.plan import build_plan
from fedlearn.runner.python_settings import override_texts
from fedlearn.runner.resume import resume as resume_run
from fedlearn.runner.rounds import RunOutcome
from fedlearn.runner.run_config import read_run_config
from fedlearn.runner.run_folder import LOG_FILE
from fedlearn.runner.run_mode import RunMode, simulation_with
from fedlearn.runner.run_result import RunFailed, RunResult
from fedlearn.runner.start import run as start_run

SETTINGS_OF_OBJECTS: Mapping[str, tuple[str, ...]] = {  # settings that an object contains
    "scenario": ("model", "partition", "framework", "device"),
    "strategy": ("cohort",),
    "privacy": (),
}
DEFAULTS = {"scenario": "heart", "strategy": "fedavg"}


def run(
    scenario: str | Scenario | None = None,
    strategy: str | Strategy | None = None,
    *,
    privacy: str | Mechanism | None = None,
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
    resume: str | Path | None = None,
    config_dir: str | Path | None = None,
    show: bool = True,
    settings: Mapping[str, Any] | None = None,
    **top_level: Any,
) -> RunResult:
    """Run one experiment in a run folder, as ``python -m simulations.run`` does.

    Scenario, strategy and privacy are names of options or objects, in any combination. A run with objects has the same
    run folder, report and checkpoints. Only the same call with ``resume`` continues it, because its folder does not
    contain the objects.

    Args:
        scenario: name of an option, e.g. ``digits``, or a scenario; None is the default of the command.
        strategy: name of an option, e.g. ``fedprox``, or a strategy, e.g. ``fedprox(mu=0.1)``.
        privacy: name of an option, e.g. ``central``, or a mechanism.
        callbacks: callbacks in addition to the default callbacks.
        folder: new run folder; None is a new folder below ``outputs``.
        resume: run folder of a stopped run, which continues after its last checkpoint.
        config_dir: folder with options of the user, as ``--config-dir``.
        show: True shows the run: as a table in a notebook, else as the command does.
        settings: dotted name -> value for all other settings, e.g. ``{"strategy.mu": 0.1}``.
        top_level: settings without a dot in their names, e.g. ``rounds=20`` or ``local=LocalSettings(epochs=2)``.

    Returns:
        The result. After Ctrl-C, its status is ``stopped``.

    Raises:
        SettingError: a setting or an argument is wrong.
        RunFailed: the run failed after its start; its run folder remains.
        FedlearnError: data or an optional dependency are missing.

    *Guarantees*: the final parameters are equal to the parameters of the command with the same settings, bit for bit.

    >>> run("digits", "fedprox", rounds=2, settings={"strategy.mu": 0.1})  # doctest: +SKIP
    """
    given = {"scenario": scenario, "strategy": strategy, "privacy": privacy}
    parts = Parts(**_objects(given), callbacks=_named(callbacks, show=show))
    values: dict[str, Any] = {name: value for name, value in given.items() if isinstance(value, str)}
    values |= {**top_level, **(settings or {}), **({} if show else {"callbacks.console": None})}
    if resume is not None:
        _refuse_new_run(resume, folder, values)
        outcome = resume_run(Path(resume), override_texts(values), run_mode=_run_mode(parts))
    else:
        job = _compose(values, parts, folder, config_dir)
        refuse_dry_run(job.cfg, "fedlearn.run")
        outcome = start_run(job, build_plan(job.cfg, parts), run_mode=_run_mode(parts))
    return _result(outcome, parts)


def _objects(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects among the arguments.

    Raises:
        SettingError: an argument is neither None, nor a name, nor an object of its class.
    """
    for name, value in given.items():
        kind = KINDS[name]
        fix = f"{name}={getattr(value, '__name__', 'name')}(...)" if callable(value) else f"{name}=null"
        expected = f"the name of an option, or a fedlearn {kind.__name__}"
        require(value is None or isinstance(value, str | kind), name, repr(value), expected, fix)
    return {name: value for name, value in given.items() if isinstance(value, KINDS[name])}


def _named(callbacks: Sequence[Callback], *, show: bool) -> dict[str, Callback]:
    is_list = isinstance(callbacks, Sequence) and all(isinstance(callback, Callback) for callback in callbacks)
    expected = "a list of instances of fedlearn.callbacks.Callback"
    require(is_list, "callbacks", repr(callbacks), expected, "callbacks=[MyCallback()]")
    named = {f"{type(callback).__name__.lower()}_{i}": callback for i, callback in enumerate(callbacks, start=1)}
    return {**named, **({"console": NotebookTable()} if show and in_notebook() else {})}


def _refuse_new_run(resume: str | Path, folder: str | Path | None, values: Mapping[str, Any]) -> None:
    require(folder is None, "folder", str(folder), "None, because resume names the run folder", "folder=null")
    for name in ("scenario", "strategy", "privacy"):
        expected = "None or an object, because the run folder has the names of options"
        require(name not in values, name, values.get(name), expected, f"{name}=null")


def _compose(values: dict[str, Any], parts: Parts, folder: str | Path | None, config_dir: str | Path | None) -> Job:
    """Return the configuration of a run, with `object_settings` in place of each object."""
    args = command_line_parser().parse_args([])
    args.config_dir = None if config_dir is None else str(Path(config_dir).absolute())
    _refuse_settings_of_objects(values, parts)
    names = {"scenario": parts.scenario and parts.scenario.name, "strategy": parts.strategy and "custom"}
    default = {name: values.get(name) or names[name] or default for name, default in DEFAULTS.items()}
    replaced: dict[str, Any] = {"run_name": "/".join(map(str, default.values()))} if any(names.values()) else {}
    replaced |= {"framework": parts.scenario.trainer.framework} if parts.scenario is not None else {}
    replaced |= {"hydra.run.dir": folder} if folder is not None else {}
    args.without = ["scenario"] if parts.scenario is not None else []
    args.overrides = with_custom_targets(override_texts({**replaced, **values}))
    (job,) = compose(args)
    with open_dict(job.cfg):
        for group in KINDS:
            if getattr(parts, group) is not None:
                job.cfg[group] = object_settings()
    if parts.scenario is not None:
        reason = "an object of a scenario exists in this process only"
        require_in_process(job.cfg.engine, "scenario", parts.scenario.name, reason, "engine='vector'")
    return job


def _refuse_settings_of_objects(values: Mapping[str, Any], parts: Parts) -> None:
    """Refuse settings that have no effect beside an object."""
    for group, names in SETTINGS_OF_OBJECTS.items():
        if getattr(parts, group) is None:
            continue
        for name, value in values.items():
            expected = f"no value: {group} is an object, which contains it"
            is_free = name not in names and not name.startswith(f"{group}.") and name != group
            require(is_free, name, value, expected, f"the call without {name}")


def _run_mode(parts: Parts) -> RunMode:
    """Return a simulation with the objects. Its commands are calls of `run` if the settings alone are not enough."""
    mode = simulation_with(parts)
    objects = ", ".join(f"{group}=..." for group in KINDS if getattr(parts, group) is not None)
    if not objects:
        return mode
    return replace(
        mode,
        rerun_command=lambda folder: f"fedlearn.run({objects})   (in Python, with the same objects)",
        resume_command=lambda folder: f"fedlearn.run(resume={str(folder)!r}, {objects})   (in Python)",
    )


def _result(outcome: RunOutcome, parts: Parts) -> RunResult:
    assert outcome.folder is not None
    if outcome.exit_code == FAILED:
        log = outcome.folder / LOG_FILE
        raise RunFailed(f"the run failed: {outcome.reason}\n  see       {log}", outcome.folder)
    allow = allowed_modules(read_run_config(outcome.folder))
    return RunResult(
        folder=outcome.folder, trainer=parts.scenario.trainer if parts.scenario else None, allow_targets=allow
    )
