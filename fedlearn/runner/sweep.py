"""Run the jobs of a sweep: one run folder for each job, and the exit code of the worst job.

Jobs run in other processes, forked from this process or started by a launcher such as joblib. So each job adds its exit
code to a file of the sweep.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

from fedlearn.callbacks.formatting import format_metric
from fedlearn.core.command_line import DONE, FAILED, STOPPED, exit_code
from fedlearn.core.threads import limit_threads
from fedlearn.errors import require
from fedlearn.runner.compat import interpolation_source, job_overrides, run_folder, use_for_interpolation
from fedlearn.runner.compose import BASIC, Job, compose_sweep, count_jobs, setting_of
from fedlearn.runner.environment import set_environment
from fedlearn.runner.interrupt import Interrupt
from fedlearn.runner.job_processes import JobProcesses, jobs_at_a_time
from fedlearn.runner.plan import require_counts
from fedlearn.runner.rounds import RunOutcome

EXIT_CODES = ".exit_codes"  # file in the folder of a sweep while it runs
SWEEP_FILE = "multirun.yaml"  # file in the folder of a sweep, which Hydra also writes
MAX_FOLDER_NAME = 100  # characters; the number of the job at the start keeps names distinct


class _Item(NamedTuple):
    """A job for another process, its sweep and name, and the source of ``${hydra:...}``."""

    sweep: Sweep
    job: Job
    name: str
    source: DictConfig


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Run the jobs of a sweep. A failed job does not stop the others; Ctrl-C does.

    Hydra calls the sweep with the settings of each job if a launcher or a sweeper of Hydra runs it.

    Args:
        folder: folder of the sweep.
        fixed: settings with the same value in all jobs.
        run: function that runs a job in its folder.
        is_parallel: True if several jobs run at the same time. Each job then prints one line.
        processes: processes that run the jobs; None runs each job in the process of the caller.
    """

    folder: Path
    fixed: frozenset[str]
    run: Callable[[Job], RunOutcome]
    is_parallel: bool
    processes: JobProcesses | None = None

    def __call__(self, cfg: DictConfig) -> float:
        """Run one job of Hydra, and return its main metric. A job in another process returns NaN."""
        created = run_folder()
        score = self._start(Job(cfg=cfg, folder=created, chosen=True), job_overrides())
        with suppress(OSError):  # remove the empty folder that Hydra created
            created.rmdir()
        return score

    def run_all(self, args: Namespace) -> None:
        """Run all jobs of a plain sweep.

        Args:
            args: command line, with the folder of the sweep.
        """
        OmegaConf.save(OmegaConf.create({"hydra": {"overrides": {"task": args.overrides}}}), self.folder / SWEEP_FILE)
        for overrides, compose_job in compose_sweep(args):
            job = self._compose(compose_job)
            if job is not None:
                self._start(job, overrides)

    def _compose(self, compose_job: Callable[[], Job]) -> Job | None:
        """Return a job, or record the exit code if two of its values exclude each other."""
        jobs: list[Job] = []

        def body() -> int:
            jobs.append(compose_job())
            return DONE

        code = exit_code(body)
        if code != DONE:
            self._record(code)
        if code == STOPPED:
            raise KeyboardInterrupt
        return jobs[0] if jobs else None

    def _start(self, job: Job, overrides: Sequence[str]) -> float:
        varied = [override for override in overrides if setting_of(override) not in self.fixed]
        name = f"job {job.folder.name}: {', '.join(varied) or 'no setting varies'}"
        job = replace(job, cfg=self._as_job(job.cfg), folder=job_folder(job.folder, varied), chosen=True)
        if self.processes is None:
            return self._run(job, name)
        self.processes.start(_Item(replace(self, processes=None), job, name, interpolation_source()))
        return float("nan")

    def _run(self, job: Job, name: str) -> float:
        """Run a job, record its exit code, and return its main metric."""
        outcome = RunOutcome(exit_code=FAILED)
        if not self.is_parallel:
            sys.stdout.write(f"{name}\n")

        def body() -> int:
            nonlocal outcome
            outcome = self.run(job)
            return outcome.exit_code

        start = time.perf_counter()
        with Interrupt(at_once=True) as interrupt:
            try:
                code = exit_code(body)
            except Exception:  # e.g. a full disk
                traceback.print_exc()
                code = FAILED
        self._record(code)
        if self.is_parallel:
            result = f"{outcome.metric} {format_metric(outcome.metric, outcome.score)}" if code == DONE else "failed"
            sys.stdout.write(f"{name}: {result}, {time.perf_counter() - start:.1f} s\n")
            sys.stdout.flush()
        if code == STOPPED or interrupt.is_requested:  # also after the last round
            raise KeyboardInterrupt
        return outcome.score

    def wait(self) -> None:
        """Wait for the jobs in other processes. Ctrl-C interrupts each job, which can then be resumed.

        Raises:
            KeyboardInterrupt: the user or a job pressed Ctrl-C.
        """
        if self.processes is not None:
            self.processes.wait()
        if self.worst_exit_code() == STOPPED:
            raise KeyboardInterrupt

    def worst_exit_code(self) -> int:
        """Return the largest exit code of all jobs."""
        path = self.folder / EXIT_CODES
        codes = set(map(int, path.read_text().split())) if path.exists() else set()
        if self.processes is not None:  # their interrupts come from this process, or are reported as deaths
            codes.discard(STOPPED)
        return max(codes, default=DONE)

    def close(self) -> None:
        """Interrupt the jobs that still run, and remove the file with the exit codes."""
        if self.processes is not None:
            self.processes.interrupt()
        (self.folder / EXIT_CODES).unlink(missing_ok=True)

    def _as_job(self, cfg: DictConfig) -> DictConfig:
        """Return the settings without automatic reports.

        If jobs run at the same time, a job has no console, and no more cores than its process.
        """
        with open_dict(cfg):
            if cfg.get("report") == "auto":
                cfg.report = False  # it takes as long as a small run; simulations.report draws it on request
            if self.is_parallel:
                cfg.callbacks.console = None
            if self.processes is not None and cfg.get("num_cores"):
                cfg.num_cores = min(cfg.num_cores, self.processes.num_cores)
        return cfg

    def _record(self, code: int) -> None:
        file = os.open(self.folder / EXIT_CODES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, f"{code}\n".encode())
        finally:
            os.close(file)


def _run_item(item: _Item) -> None:
    use_for_interpolation(item.source)
    item.sweep._run(item.job, item.name)


def _report_death(item: _Item) -> None:
    """Record the failure of a job whose process died."""
    item.sweep._record(FAILED)
    sys.stderr.write(f"{item.name}: its process died, perhaps because memory ran out\n  advice    num_jobs=1\n")


def _import_framework(framework: str | None, device: str) -> None:
    set_environment(framework, device=device)
    if framework in ("torch", "jax"):
        with suppress(Exception):  # each job reports it
            import_module(f"fedlearn.trainers.{framework}")


def processes_for(first: Job, overrides: Sequence[str]) -> JobProcesses | None:
    """Return the processes for the jobs of a sweep, which import the framework while the caller prepares the jobs.

    Args:
        first: first job of the sweep, whose settings are the settings of the sweep.
        overrides: overrides of the command line.

    Returns:
        None if a launcher of Hydra or this process runs the jobs.

    Raises:
        SettingError: ``num_jobs`` is set, but this process cannot fork or a launcher runs the jobs. Or ``num_jobs`` or
            ``num_cores`` is no number.
    """
    cfg, device = first.cfg, first.cfg.get("device") or "cpu"
    require_counts(cfg)
    limit_threads(cfg.get("num_cores"))
    size = jobs_at_a_time(cfg.get("num_jobs"), cfg.engine, device)
    others = [first.choices.get(group, BASIC) for group in ("hydra/launcher", "hydra/sweeper")]
    if others != [BASIC, BASIC]:
        expected = f"null, because {' and '.join(name for name in others if name != BASIC)} runs the jobs"
        require(cfg.get("num_jobs") is None, "num_jobs", cfg.get("num_jobs"), expected, "num_jobs=null")
        return None
    if size == 1:
        return None
    return JobProcesses(
        min(size, count_jobs(overrides)) if first.is_plain_sweep else size,  # a file may have further values
        prepare=partial(_import_framework, cfg.get("framework"), device),
        run=_run_item,
        report_death=_report_death,
    )


def job_folder(created: Path, varied: Sequence[str]) -> Path:
    """Return the run folder of a job, whose name has the number of the job and the settings that vary.

    A folder that the user named with ``hydra.sweep.subdir`` keeps its name.

    >>> job_folder(Path("multirun/3"), ["strategy=fedprox", "local.learning_rate=0.1"]).name
    '3_strategy=fedprox_learning_rate=0.1'
    """
    if not created.name.isdigit() or not varied:
        return created
    short = "_".join(
        text.lstrip("+").rpartition("=")[0].rpartition(".")[2] + "=" + text.rpartition("=")[2] for text in varied
    )
    plain = re.sub(r"[^\w.=,-]+", "-", short)
    return created.with_name(f"{created.name}_{plain}"[:MAX_FOLDER_NAME])
