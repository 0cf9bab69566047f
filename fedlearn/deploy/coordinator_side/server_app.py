"""Execute a submitter's request at the coordinator. Flower starts this app in a process for each run.

A run executes the same training loop as a simulation, over Flower's grid. A request is one JSON object, the only
setting of the run::

    {"do": "run", "settings": {...}, "folder": "heart/fedavg/...", "chosen": false, "width": 100,
     "rerun_command": "python -m ...", "resume_command": "python -m ... --resume {folder}"}
    {"do": "resume", "folder": "heart/fedavg/...", "overrides": ["rounds=50"], "width": null}

``rerun_command`` and ``resume_command`` are commands for the submitter. ``width`` is the width of the submitter's
terminal in characters; null: plain lines. The coordinator adds ``name``, the name of the run, and ``person``, the name
of the person who sent the request (`fedlearn.deploy.coordinator_side.control_access`). The exit code is in Flower's
details of the run: ``fedlearn exit 130``.
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
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from fedlearn.advice import command
from fedlearn.callbacks.console import Console
from fedlearn.core.command_line import DONE, FAILED, STOPPED, exit_code
from fedlearn.core.import_path import search_working_folder_last
from fedlearn.core.random import Purpose, generator
from fedlearn.core.tasks import TASKS, Task, as_task
from fedlearn.deploy.coordinator_side.admission import Admission
from fedlearn.deploy.coordinator_side.app_bundle import EXIT_MARKER, NAME_KEY, PERSON_KEY, REQUEST_KEY
from fedlearn.deploy.coordinator_side.connections import connections_of
from fedlearn.deploy.coordinator_side.environment import NODES_ENV, RUNS_ENV, STATE_ENV
from fedlearn.deploy.coordinator_side.ownership import (
    DEPLOYMENT_FILE,
    require_outside_runs,
    require_owner,
    require_submitter,
)
from fedlearn.deploy.coordinator_side.remote_scenario import remote_scenario
from fedlearn.deploy.coordinator_side.run_audit import audited
from fedlearn.deploy.coordinator_side.run_process import process_file
from fedlearn.deploy.coordinator_side.run_sites import SITES_FILE, SiteDirectory, build_run_sites
from fedlearn.deploy.coordinator_side.studies import STUDIES, find_study, read_studies
from fedlearn.deploy.coordinator_side.submissions import Submissions, stoppable
from fedlearn.deploy.coordinator_side.submitted_settings import (
    check_submitted_settings,
    coordinator_registry,
    read_submitted_settings,
)
from fedlearn.deploy.node_bindings import BINDINGS
from fedlearn.deploy.node_side.masking_keys import IDENTITIES
from fedlearn.deploy.processes import die_with_parent, return_freed_memory
from fedlearn.engines.deployed import DeployedEngine
from fedlearn.errors import require
from fedlearn.protocol.sites import RunSites
from fedlearn.runner.compose import Job
from fedlearn.runner.experiment import Experiment, apply_privacy, check_early_stop, with_virtual_clock
from fedlearn.runner.named_settings import name_builder
from fedlearn.runner.plan import Plan, build_plan
from fedlearn.runner.registry import Registry
from fedlearn.runner.resume import resume
from fedlearn.runner.run_config import config_to_dict
from fedlearn.runner.run_folder import RunFolderError
from fedlearn.runner.run_mode import RunMode
from fedlearn.runner.site_settings import read_site_settings
from fedlearn.runner.start import run
from fedlearn.runner.user_code import add_metrics, find_metrics, find_task

MIN_WIDTH, MAX_WIDTH = 20, 500  # characters per line of the console

app = ServerApp()


class NonzeroExit(Exception):
    """Report a nonzero exit code of a run to Flower."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute the request of a run.

    Raises:
        NonzeroExit: The exit code is not 0; the message has the exit code.
    """
    die_with_parent()  # otherwise Flower would poll a coordinator that has ended
    _log_to_file_only()
    search_working_folder_last()  # the working folder of the coordinator has the modules that its operator allows
    request = json.loads(str(context.run_config[REQUEST_KEY]))
    submitted = {**request, **{key: str(context.run_config.get(key, "")) for key in (NAME_KEY, PERSON_KEY)}}
    with _interruptible():
        try:
            code = exit_code(lambda: _execute_audited(submitted, grid, context.run_id, Path(os.environ[RUNS_ENV])))
        except Exception:
            traceback.print_exc()
            code = FAILED
    if code == STOPPED and not Submissions(Path(os.environ[STATE_ENV])).is_stop_requested(context.run_id):
        raise NonzeroExit("a signal that no person has sent")  # without an exit code, the coordinator resumes the run
    if code != DONE:
        raise NonzeroExit(f"{EXIT_MARKER} {code}")


def _execute_audited(request: Mapping[str, Any], grid: Grid, run_id: int, runs: Path) -> int:
    """Execute a request until a person stops it; the audit log has the start and the end of a run."""
    execute_request, state = partial(execute, request, grid, run_id, runs), Path(os.environ[STATE_ENV])
    folder = _folder_in(runs, request["folder"])
    with process_file(state, run_id), stoppable(Submissions(state), run_id):
        return audited(execute_request, state, request, number=run_id, folder=folder)


def execute(request: Mapping[str, Any], grid: Grid, run_id: int, runs: Path) -> int:
    """Execute a request, and return its exit code.

    Args:
        request: a request, see the module's documentation.
        grid: Flower's connection to the nodes.
        run_id: Flower's id of the run.
        runs: folder of the run folders.

    Raises:
        FedlearnError: See `fedlearn.runner.start.run` and `fedlearn.runner.resume.resume`.
    """
    folder = _folder_in(runs, request["folder"])
    require_submitter(str(request.get(PERSON_KEY) or ""))
    if request["do"] == "resume":
        require_owner(folder, request.get(PERSON_KEY))
        _print_folder(folder, runs)
        return resume(folder, request["overrides"], run_mode=_run_mode(grid, request, runs)).exit_code
    require_outside_runs(folder, runs)
    job = Job(cfg=read_submitted_settings(request["settings"]), folder=folder, chosen=bool(request["chosen"]))
    if job.cfg.get("init"):  # a submitter must not read other files of the coordinator
        job.cfg.init = str(_folder_in(runs, str(job.cfg.init)))
        require_owner(Path(job.cfg.init), request.get(PERSON_KEY))
    return run(job, build_plan(job.cfg), run_mode=_run_mode(grid, request, runs)).exit_code


def _run_mode(grid: Grid, request: Mapping[str, Any], runs: Path) -> RunMode:
    def build(cfg: DictConfig, planned: Plan | None, folder: Path) -> Experiment:
        if request["do"] == "resume":
            deployment, plan, origin = _read_deployment(folder), planned or build_plan(cfg), _origin(request)
            sites = _run_sites(cfg, plan, folder, person)
            return build_deployed_experiment(cfg, plan, grid, deployment["id"], sites, origin=origin)
        _print_folder(folder, runs)
        deployment = {"id": request.get(NAME_KEY) or uuid.uuid4().hex, PERSON_KEY: request.get(PERSON_KEY, "")}
        deployment |= {name: request[name] for name in ("rerun_command", "resume_command")}
        # written before nodes join, because a run that is interrupted while it waits for nodes must be resumable
        (folder / DEPLOYMENT_FILE).write_text(json.dumps(deployment), encoding="utf-8")
        try:
            plan = planned or build_plan(cfg)
            sites = _run_sites(cfg, plan, folder, person)
            return build_deployed_experiment(cfg, plan, grid, deployment["id"], sites, origin=_origin(request))
        except BaseException:
            for name in (DEPLOYMENT_FILE, SITES_FILE):
                (folder / name).unlink(missing_ok=True)
            raise

    person = str(request.get(PERSON_KEY) or "")
    width = _read_width(request.get("width"))
    return RunMode(
        build_experiment=build,
        create_console=lambda: Console(terminal=width is not None, width=width, live=False),
        rerun_command=lambda folder: str(_read_deployment(folder)["rerun_command"]),
        resume_command=lambda folder: str(_read_deployment(folder)["resume_command"]).replace(
            "{folder}", shlex.quote(_name_of(folder, runs))
        ),
        check_settings=check_submitted_settings,
        files=(DEPLOYMENT_FILE, SITES_FILE),
    )


def _run_sites(cfg: DictConfig, plan: Plan, folder: Path, person: str) -> RunSites:
    """Return the sites that a run may ask; see `build_run_sites`.

    Raises:
        FedlearnError: A site or the study is unknown, or the person may not submit runs of the study.
    """
    settings = read_site_settings(config_to_dict(cfg))
    study = find_study(read_studies(Path(os.environ[NODES_ENV]).parent / STUDIES), settings.study, person)
    directory, is_private = SiteDirectory(Path(os.environ[STATE_ENV])), plan.privacy.kind != "none"
    return build_run_sites(settings, directory, folder, study=study, is_private=is_private)


def _read_width(width: Any) -> int | None:
    """Return the width of the submitter's terminal within limits, because each line may be that long."""
    return min(max(width, MIN_WIDTH), MAX_WIDTH) if type(width) is int else None


def _origin(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the person and the folder of a run, for the audit logs of the nodes."""
    return {name: str(request.get(name, "")) for name in (PERSON_KEY, "folder")}


def build_deployed_experiment(
    cfg: DictConfig, plan: Plan, grid: Grid, run: str, sites: RunSites, *, origin: Mapping[str, str]
) -> Experiment:
    """Return an experiment whose data and trainers are at the nodes.

    Args:
        cfg: settings of the run.
        plan: plan of these settings.
        grid: Flower's connection to the nodes.
        run: name of the run; nodes keep client states under this name.
        sites: sites of the run.
        origin: person and folder of the run, for the audit logs of the nodes.

    Raises:
        FedlearnError: A setting is for simulations only, or too few sites joined in time.
    """
    expected = "null, because the coordinator has no data to train a baseline"
    require(not plan.baselines, "baseline", ", ".join(plan.baselines), expected, "baseline=null")
    expected = "null, because the coordinator has no rows to divide into groups"
    require(not plan.subgroups, "subgroups", ", ".join(plan.subgroups), expected, "subgroups=null")
    return_freed_memory()  # the settings of the environment are for processes that train
    settings = config_to_dict(cfg)
    protocol = settings["privacy"].get("protocol", "sum")
    expected = "sum, because real nodes always run the full protocol"
    require(protocol == "sum", "privacy.protocol", protocol, expected, "privacy.protocol=sum")
    registry = coordinator_registry()
    names = partial(name_builder, registry)
    node_settings = {group: names(group, settings[group]) for group in ("scenario", "strategy")}
    node_settings["buffers"] = None if plan.buffers == "refuse" else plan.buffers
    node_settings["compress"] = None if plan.compress.codec is None else names("compress", settings["compress"])
    paths = settings.get("metrics") or []
    node_settings["metrics"] = [registry.name_of("metric", path) for path in paths]
    options = {name: value for name, value in settings["engine"].items() if name != "_target_"}
    options |= {"find_task": partial(_registered_task, registry), "metrics": find_metrics(paths, registry.modules)}
    keys = Path(os.environ[NODES_ENV]).parent
    state = Path(os.environ[STATE_ENV])
    options |= {"connected_since": connections_of(state), "folder": state}
    admission = Admission(state, keys / BINDINGS, keys / IDENTITIES, run=run)
    engine = DeployedEngine(grid, node_settings, run=run, sites=sites, check_member=admission.check, **options)
    engine.exchange.origin = origin
    try:
        scenario = add_metrics(remote_scenario(engine), paths, cfg.get("metric"), allow=registry.modules)
        plan = apply_privacy(plan, scenario, num_parties=engine.num_parties)
        if plan.strategy.privacy_guarantee is not None:
            calibrated = {"noise_multiplier": plan.strategy.privacy_guarantee.noise_multiplier, "epsilon": None}
            calibrated = {name: value for name, value in calibrated.items() if name in settings["privacy"]}
            engine.set_privacy({**names("privacy", settings["privacy"]), **calibrated}, rounds=plan.schedule.rounds)
        select, rng = plan.strategy.select, generator(plan.seed, Purpose.SELECT, round=1)
        select.choose(1, scenario.data.clients, rng, **select.initial_state)
        if plan.strategy.asynchrony is not None:
            plan.strategy.asynchrony.validate(len(scenario.data.clients))
        check_early_stop(cfg, scenario.data.task)
        _refuse_metric_of_outputs(cfg.early_stop.get("metric"), scenario.data.task)
    except BaseException:
        engine.close()
        raise
    return Experiment(plan=plan, scenario=scenario, engine=with_virtual_clock(engine, plan, scenario))


def _registered_task(registry: Registry, name: str) -> Task:
    """Return a shipped task, or a task that the operator has registered. The name is text of a node.

    Raises:
        SettingError: the name is unknown. Nothing is imported.
    """
    return as_task(name) if name in TASKS else find_task(registry.target("task", name, "task"), registry.modules)


def _refuse_metric_of_outputs(metric: str | None, task: Task) -> None:
    """Refuse early stopping by a metric that needs all outputs in one place, e.g. AUC."""
    is_pooled = metric is None or task.metric(metric).is_pooled_from_clients or task.averages_lists
    expected = "a metric that is a sum over clients, because predictions stay at the nodes"
    require(is_pooled, "early_stop.metric", metric, expected, "early_stop.metric=loss")


def _folder_in(runs: Path, name: str) -> Path:
    folder = (runs / name).resolve()
    if not folder.is_relative_to(runs.resolve()) or folder == runs.resolve():
        expected, fix = "a path below the folder that --runs names at the coordinator", "use a relative path"
        raise RunFolderError(f"{name} is outside the coordinator's runs\n  expected  {expected}\n  advice    {fix}")
    return folder


def _name_of(folder: Path, runs: Path) -> str:
    return str(folder.resolve().relative_to(runs.resolve()))


def _print_folder(folder: Path, runs: Path) -> None:
    sys.stdout.write(f"run        {_name_of(folder, runs)}\n")


def _read_deployment(folder: Path) -> dict[str, Any]:
    try:
        deployment = dict(json.loads((folder / DEPLOYMENT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        fix = command("python -m simulations.resume", folder)
        raise RunFolderError(f"{folder} has no deployed run: {error}\n  try       {fix}") from error
    if not {"id", "rerun_command", "resume_command"} <= deployment.keys():
        fix = "the version of fedlearn that started the run, or a new run"
        raise RunFolderError(f"{folder / DEPLOYMENT_FILE} was written by another version\n  advice    {fix}")
    return deployment


def _log_to_file_only() -> None:
    """Keep Flower's log lines from the submitter; the root logger writes them to the log of the run."""
    logging.getLogger("flwr").handlers.clear()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise each poll logs a line


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at a signal; Flower's handlers would end the process while it writes a file."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
