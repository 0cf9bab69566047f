"""What Flower starts at the coordinator for each run: the simulator's own rounds, over Flower's grid.

An order is one JSON object, the run's only setting::

    {"do": "run", "settings": {...}, "folder": "heart/fedavg/...", "chosen": false, "width": 100,
     "rerun_command": "python -m ...", "resume_command": "python -m ... --resume {folder}"}
    {"do": "resume", "folder": "heart/fedavg/...", "overrides": ["rounds=50"], "width": null}
    {"do": "stop", "run": 1234}

``rerun_command`` and ``resume_command`` are for whoever looks on; ``width`` is that of the terminal to draw for, null
for plain lines. How it ended is the last line of what Flower keeps about the run: ``fedlearn exit 130``.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from fedlearn.callbacks.console import Console
from fedlearn.core.command_line import DONE, FAILED, exit_code
from fedlearn.core.import_path import search_working_folder_last
from fedlearn.core.random import Purpose, generator
from fedlearn.deploy.coordinator import NODES_ENV, RUNS_ENV
from fedlearn.deploy.coordinator_side.app_bundle import EXIT_MARKER, REQUEST_KEY
from fedlearn.deploy.coordinator_side.remote_scenario import remote_scenario
from fedlearn.deploy.coordinator_side.submitted_settings import check_submitted_settings
from fedlearn.deploy.processes import die_with_parent
from fedlearn.engines.deployed import DeployedEngine
from fedlearn.errors import FedlearnError, require
from fedlearn.runner.compose import Job
from fedlearn.runner.config import (
    Experiment,
    Plan,
    apply_privacy,
    build_plan,
    check_early_stop,
    with_virtual_clock,
)
from fedlearn.runner.resume import resume
from fedlearn.runner.run_config import config_from_dict, config_to_dict
from fedlearn.runner.run_folder import RunFolderError
from fedlearn.runner.run_mode import RunMode
from fedlearn.runner.start import run

DEPLOYMENT_FILE = "deployment.json"  # in the run folder: what a resumed run must know of the one before
RUNNING_FOLDER = ".running"  # a folder beside the runs': the process of each run that is going on

app = ServerApp()


class NonzeroExit(Exception):
    """How Flower is told that a run did not end well."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the order.

    Raises:
        Ended: with the exit code, unless that is 0.
    """
    die_with_parent()  # Flower would go on asking a coordinator that is gone
    _log_to_file_only()
    search_working_folder_last()  # the coordinator's, for modules that its operator allows
    order = json.loads(str(context.run_config[REQUEST_KEY]))
    with _interruptible():
        try:
            code = exit_code(lambda: execute(order, grid, context.run_id, Path(os.environ[RUNS_ENV])))
        except Exception:
            traceback.print_exc()
            code = FAILED
    if code != DONE:
        raise NonzeroExit(f"{EXIT_MARKER} {code}")


def execute(request: Mapping[str, Any], grid: Grid, run_id: int, runs: Path) -> int:
    """Do what an order says.

    Args:
        request: see the head of this file.
        grid: Flower's.
        run_id: Flower's, by which a stop order names the run.
        runs: where run folders lie.

    Raises:
        FedlearnError: see `fedlearn.runner.start.run` and `fedlearn.runner.resume.resume`.
    """
    if request["do"] == "stop":
        return _stop(runs / RUNNING_FOLDER / str(request["run"]))
    folder = _inside(runs, request["folder"])
    with _noted(runs / RUNNING_FOLDER / str(run_id)):
        if request["do"] == "resume":
            _tell_folder(folder, runs)
            return resume(folder, request["overrides"], run_mode=_venue(grid, request, runs)).exit_code
        settings = dict(request["settings"])
        if settings.get("init"):  # a submitter must not read other files of the coordinator
            settings["init"] = str(_inside(runs, str(settings["init"])))
        job = Job(cfg=config_from_dict(settings), folder=folder, chosen=bool(request["chosen"]))
        check_submitted_settings(job.cfg)
        return run(job, build_plan(job.cfg), run_mode=_venue(grid, request, runs)).exit_code


def _venue(grid: Grid, order: Mapping[str, Any], runs: Path) -> RunMode:
    def build(cfg: DictConfig, planned: Plan | None, folder: Path) -> Experiment:
        if order["do"] == "resume":
            return build_deployed_experiment(cfg, planned or build_plan(cfg), grid, _note(folder)["id"])
        _tell_folder(folder, runs)
        note = {"id": uuid.uuid4().hex} | {name: order[name] for name in ("rerun_command", "resume_command")}
        (folder / DEPLOYMENT_FILE).write_text(
            json.dumps(note), encoding="utf-8"
        )  # now: a run can be cut off while nodes join
        try:
            return build_deployed_experiment(cfg, planned or build_plan(cfg), grid, note["id"])
        except BaseException:
            (folder / DEPLOYMENT_FILE).unlink()
            raise

    width = order.get("width")
    return RunMode(
        build_experiment=build,
        create_console=lambda: Console(terminal=width is not None, width=width, live=False),
        rerun_command=lambda folder: str(_note(folder)["rerun_command"]),
        resume_command=lambda folder: str(_note(folder)["resume_command"]).replace(
            "{folder}", shlex.quote(_name(folder, runs))
        ),
        check_settings=check_submitted_settings,
    )


def build_deployed_experiment(cfg: DictConfig, plan: Plan, grid: Grid, run: str) -> Experiment:
    """An experiment whose data and trainers are at nodes; here is only what they tell of them.

    Raises:
        FedlearnError: too few nodes join in time, or they do not fit together.
    """
    metric = cfg.early_stop.get("metric")
    expected = "a metric that adds up over clients: single predictions stay at the nodes"
    require(metric != "auc", "early_stop.metric", metric, expected, "early_stop.metric=loss")
    expected = "null: data stay at the nodes, and no model is trained besides the federation's"
    require(not plan.baselines, "baseline", ", ".join(plan.baselines), expected, "baseline=null")
    settings = config_to_dict(cfg)
    protocol = settings["privacy"].get("protocol", "sum")
    expected = "sum: real nodes run the protocol anyway, full is for simulations"
    require(protocol == "sum", "privacy.protocol", protocol, expected, "privacy.protocol=sum")
    words = {name: settings.get(name) for name in ("scenario", "strategy", "allow_targets", "framework")}
    words["privacy"] = None if plan.privacy.kind == "none" else settings["privacy"]
    words["buffers"] = None if plan.buffers == "refuse" else plan.buffers
    words["compress"] = None if plan.compress.codec is None else settings["compress"]
    options = {name: value for name, value in settings["engine"].items() if name != "_target_"}
    if options.get("num_nodes") is None:
        options["num_nodes"] = max(1, len(list(Path(os.environ[NODES_ENV]).glob("*.pub"))))
    engine = DeployedEngine(grid, words, run=run, **options)
    try:
        scenario = remote_scenario(engine)
        plan = apply_privacy(plan, scenario)
        if plan.strategy.privacy_guarantee is not None:
            found = {
                "noise_multiplier": plan.strategy.privacy_guarantee.noise_multiplier,
                "epsilon": None,
            }
            found = {name: value for name, value in found.items() if name in settings["privacy"]}
            engine.set_privacy({**settings["privacy"], **found}, rounds=plan.schedule.rounds)
        select, rng = plan.strategy.select, generator(plan.seed, Purpose.SELECT, round=1)
        select.choose(1, scenario.data.clients, rng, **select.initial_state)
        if plan.strategy.asynchrony is not None:
            plan.strategy.asynchrony.validate(len(scenario.data.clients))
        check_early_stop(cfg, scenario.data.task)
    except BaseException:
        engine.close()
        raise
    on_clock = with_virtual_clock(engine, plan, scenario)
    return Experiment(plan=plan, scenario=scenario, engine=on_clock)


def _inside(runs: Path, name: str) -> Path:
    folder = (runs / name).resolve()
    if not folder.is_relative_to(runs.resolve()) or folder == runs.resolve():
        fix = "a relative path: folders lie where the coordinator keeps runs"
        raise RunFolderError(f"{name} lies outside the coordinator's runs\n  try       {fix}")
    return folder


def _name(folder: Path, runs: Path) -> str:
    return str(folder.resolve().relative_to(runs.resolve()))


def _tell_folder(folder: Path, runs: Path) -> None:
    sys.stdout.write(f"run        {_name(folder, runs)}\n")


def _note(folder: Path) -> dict[str, Any]:
    try:
        note = dict(json.loads((folder / DEPLOYMENT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        fix = f"python -m simulations.resume {folder}, if it was a simulation"
        raise RunFolderError(f"{folder} holds no deployed run: {error}\n  try       {fix}") from error
    if not {"id", "rerun_command", "resume_command"} <= note.keys():
        fix = "resume with the version of fedlearn that wrote it, or start a new run"
        raise RunFolderError(f"{folder / DEPLOYMENT_FILE} was written by another version\n  try       {fix}")
    return note


@contextmanager
def _noted(path: Path) -> Iterator[None]:
    """Say for the time of a run which process it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{os.getpid()} {os.getppid()}", encoding="ascii")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _stop(path: Path) -> int:
    """Interrupt a run as Ctrl-C does: it finishes its round and saves it."""
    try:
        process, parent = map(int, path.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        raise FedlearnError("that run is not going on") from None
    if parent == os.getppid():  # else the number is a leftover, and may be anybody's by now
        os.kill(process, signal.SIGINT)
    return DONE


def _log_to_file_only() -> None:
    """Keep Flower's own lines out of what the operator sees; they reach the run's log by way of the root logger."""
    logging.getLogger("flwr").handlers.clear()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each poll


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let signals interrupt as in any program, not end the process in the middle of a file."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
