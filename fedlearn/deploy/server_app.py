"""What Flower starts at the coordinator for each run: the simulator's own rounds, over Flower's grid.

An order is one JSON object, the run's only setting::

    {"do": "run", "settings": {...}, "folder": "heart/fedavg/...", "chosen": false, "width": 100,
     "again": "python -m ...", "resume": "python -m ... --resume {folder}"}
    {"do": "resume", "folder": "heart/fedavg/...", "changes": ["rounds=50"], "width": null}
    {"do": "stop", "run": 1234}

``again`` and ``resume`` are commands for whoever looks on; ``width`` is that of the terminal to draw for, null for
plain lines. How it ended is the last line of what Flower keeps about the run: ``fedlearn exit 130``.
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

from fedlearn.config import Experiment, Plan, clocked, plan, protected
from fedlearn.deploy.absent import absent_scenario
from fedlearn.deploy.bundle import ENDED, ORDER
from fedlearn.deploy.children import die_with_parent
from fedlearn.deploy.coordinator import NODES, RUNS
from fedlearn.early_stop import EarlyStop
from fedlearn.engines.grid import GridEngine
from fedlearn.errors import FedlearnError, require
from fedlearn.seeds import Purpose, generator
from fedlearn.sinks.console import Console
from simulations.exits import DONE, FAILED, exit_code
from simulations.folder import FolderError
from simulations.overrides import Job
from simulations.recipe import from_plain, plain_settings
from simulations.resume import resume
from simulations.run import run
from simulations.venue import Venue

NOTE = "deployment.json"  # in the run folder: what a resumed run must know of the one before
RUNNING = ".running"  # a folder beside the runs': the process of each run that is going on

app = ServerApp()


class Ended(Exception):
    """How Flower is told that a run did not end well."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the order.

    Raises:
        Ended: with the exit code, unless that is 0.
    """
    die_with_parent()  # Flower would go on asking a coordinator that is gone
    _log_to_file_only()
    order = json.loads(str(context.run_config[ORDER]))
    with _interruptible():
        try:
            code = exit_code(lambda: obey(order, grid, context.run_id, Path(os.environ[RUNS])))
        except Exception:
            traceback.print_exc()
            code = FAILED
    if code != DONE:
        raise Ended(f"{ENDED} {code}")


def obey(order: Mapping[str, Any], grid: Grid, run_id: int, runs: Path) -> int:
    """Do what an order says.

    Args:
        order: see the head of this file.
        grid: Flower's.
        run_id: Flower's, by which a stop order names the run.
        runs: where run folders lie.

    Raises:
        FedlearnError: see `simulations.run.run` and `simulations.resume.resume`.
    """
    if order["do"] == "stop":
        return _stop(runs / RUNNING / str(order["run"]))
    folder = _inside(runs, order["folder"])
    with _noted(runs / RUNNING / str(run_id)):
        if order["do"] == "resume":
            _tell_folder(folder, runs)
            return resume(folder, order["changes"], venue=_venue(grid, order, runs)).exit_code
        job = Job(cfg=from_plain(order["settings"]), folder=folder, chosen=bool(order["chosen"]))
        return run(job, plan(job.cfg), venue=_venue(grid, order, runs)).exit_code


def _venue(grid: Grid, order: Mapping[str, Any], runs: Path) -> Venue:
    def build(cfg: DictConfig, planned: Plan | None, folder: Path) -> Experiment:
        if order["do"] == "resume":
            return deployed(cfg, planned or plan(cfg), grid, _note(folder)["id"])
        _tell_folder(folder, runs)
        note = {"id": uuid.uuid4().hex, "again": order["again"], "resume": order["resume"]}
        (folder / NOTE).write_text(json.dumps(note), encoding="utf-8")  # now: a run can be cut off while nodes join
        try:
            return deployed(cfg, planned or plan(cfg), grid, note["id"])
        except BaseException:
            (folder / NOTE).unlink()
            raise

    width = order.get("width")
    return Venue(
        build=build,
        console=lambda: Console(terminal=width is not None, width=width, live=False),
        again=lambda folder: str(_note(folder)["again"]),
        resume=lambda folder: str(_note(folder)["resume"]).replace("{folder}", shlex.quote(_name(folder, runs))),
    )


def deployed(cfg: DictConfig, planned: Plan, grid: Grid, run: str) -> Experiment:
    """An experiment whose data and trainers are at nodes; here is only what they tell of them.

    Raises:
        FedlearnError: too few nodes join in time, or they do not fit together.
    """
    metric = planned.early_stop.get("metric")
    expected = "a metric that adds up over clients: single predictions stay at the nodes"
    require(metric != "auc", "early_stop.metric", metric, expected, "early_stop.metric=loss")
    expected = "null: data stay at the nodes, and no model is trained besides the federation's"
    require(not planned.baselines, "baseline", ", ".join(planned.baselines), expected, "baseline=null")
    settings = plain_settings(cfg)
    protocol = settings["privacy"].get("protocol", "sum")
    expected = "sum: real nodes run the protocol anyway, full is for simulations"
    require(protocol == "sum", "privacy.protocol", protocol, expected, "privacy.protocol=sum")
    words = {name: settings.get(name) for name in ("scenario", "strategy", "allow_targets", "framework")}
    words["privacy"] = None if planned.privacy.kind == "none" else settings["privacy"]
    words["buffers"] = None if planned.buffers == "refuse" else planned.buffers
    words["compress"] = None if planned.compress.codec is None else settings["compress"]
    options = {name: value for name, value in settings["engine"].items() if name != "_target_"}
    if options.get("nodes") is None:
        options["nodes"] = max(1, len(list(Path(os.environ[NODES]).glob("*.pub"))))
    engine = GridEngine(grid, words, run=run, **options)
    try:
        scenario = absent_scenario(engine)
        planned = protected(planned, scenario)
        if planned.strategy.protection is not None:
            found = {"noise_multiplier": planned.strategy.protection.facts["noise_multiplier"], "epsilon": None}
            found = {name: value for name, value in found.items() if name in settings["privacy"]}
            engine.protect({**settings["privacy"], **found}, rounds=planned.schedule.rounds)
        select, rng = planned.strategy.select, generator(planned.seed, Purpose.SELECT, round=1)
        select.choose(1, scenario.data.clients, rng, **select.memory)
        if planned.strategy.asynchrony is not None:
            planned.strategy.asynchrony.suit(len(scenario.data.clients))
        stop = EarlyStop(**planned.early_stop, task=scenario.data.task) if planned.early_stop else None
    except BaseException:
        engine.close()
        raise
    on_clock = clocked(engine, planned, scenario)
    return Experiment(plan=planned, scenario=scenario, engine=on_clock, early_stop=stop)


def _inside(runs: Path, name: str) -> Path:
    folder = (runs / name).resolve()
    if not folder.is_relative_to(runs.resolve()) or folder == runs.resolve():
        fix = "a relative path: folders lie where the coordinator keeps runs"
        raise FolderError(f"{name} lies outside the coordinator's runs\n  try       {fix}")
    return folder


def _name(folder: Path, runs: Path) -> str:
    return str(folder.resolve().relative_to(runs.resolve()))


def _tell_folder(folder: Path, runs: Path) -> None:
    sys.stdout.write(f"run        {_name(folder, runs)}\n")


def _note(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        fix = f"python -m simulations.resume {folder}, if it was a simulation"
        raise FolderError(f"{folder} holds no deployed run: {error}\n  try       {fix}") from error


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
