"""Run the jobs of a sweep: one run folder for each job, and the exit code of the worst job.

Jobs run in other processes, forked from this process or started by a launcher such as joblib. So each job adds its exit
code to a file of the sweep.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, open_dict

from fedlearn.callbacks.formatting import format_metric
from fedlearn.core.command_line import DONE, FAILED, STOPPED, exit_code
from fedlearn.errors import require
from fedlearn.runner.compat import interpolation_source, job_overrides, run_folder, use_for_interpolation
from fedlearn.runner.compose import Job, setting_of
from fedlearn.runner.environment import set_environment
from fedlearn.runner.job_processes import JobProcesses, jobs_at_a_time
from fedlearn.runner.rounds import RunOutcome

EXIT_CODES = ".exit_codes"  # file in the folder of a sweep while it runs
BASIC = "basic"  # Hydra's name of the launcher that runs one job after another, and of its sweeper
MAX_FOLDER_NAME = 100  # characters; the number of the job at the start keeps names distinct


class _Item(NamedTuple):
    """A job for another process, its name, the folder that Hydra created, and the source of ``${hydra:...}``."""

    job: Job
    name: str
    created: Path
    source: DictConfig


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Function of Hydra for the jobs of a sweep. A failed job does not stop the others; Ctrl-C does.

    Args:
        folder: folder of the sweep.
        fixed: settings with the same value in all jobs.
        run: function that runs a job in its folder.
        is_parallel: True if several jobs run at the same time. Each job then prints one line.
        framework: framework of the first job, which the processes import.
        num_processes: number of processes that run the jobs; 0 runs each job in the process of the launcher.
    """

    folder: Path
    fixed: frozenset[str]
    run: Callable[[Job], RunOutcome]
    is_parallel: bool
    framework: str | None = None
    num_processes: int = 0

    @cached_property
    def _processes(self) -> JobProcesses:
        return JobProcesses(
            self.num_processes,
            prepare=partial(_import_framework, self.framework),
            run=self._run_in_process,
            report_death=self._report_death,
        )

    def start_processes(self) -> None:
        """Start the processes, which import the framework while Hydra prepares the jobs."""
        if self.num_processes:
            _ = self._processes

    def __call__(self, cfg: DictConfig) -> float:
        """Run one job, and return its main metric. A job in another process has no metric yet: it returns NaN."""
        created = run_folder()
        varied = [override for override in job_overrides() if setting_of(override) not in self.fixed]
        name = f"job {created.name}: {', '.join(varied) or 'no setting varies'}"
        job = Job(cfg=self._as_job(cfg), folder=job_folder(created, varied), chosen=True)
        if not self.num_processes:
            return self._run(job, name, created)
        self._processes.start(_Item(job, name, created, interpolation_source()))
        return float("nan")

    def _run(self, job: Job, name: str, created: Path) -> float:
        """Run a job, record its exit code, and return its main metric."""
        outcome = RunOutcome(exit_code=FAILED)
        if not self.is_parallel:
            sys.stdout.write(f"{name}\n")

        def body() -> int:
            nonlocal outcome
            outcome = self.run(job)
            return outcome.exit_code

        start = time.perf_counter()
        code = exit_code(body)
        self._record(code)
        if self.is_parallel:
            result = f"{outcome.metric} {format_metric(outcome.metric, outcome.score)}" if code == DONE else "failed"
            sys.stdout.write(f"{name}: {result}, {time.perf_counter() - start:.1f} s\n")
            sys.stdout.flush()
        if code == STOPPED:
            raise KeyboardInterrupt
        with suppress(OSError):  # remove the empty folder that Hydra created
            created.rmdir()
        return outcome.score

    def _run_in_process(self, item: _Item) -> None:
        use_for_interpolation(item.source)
        self._run(item.job, item.name, item.created)

    def _report_death(self, item: _Item) -> None:
        """Record the failure of a job whose process died."""
        self._record(FAILED)
        sys.stderr.write(f"{item.name}: its process died, perhaps because memory ran out\n  advice    num_jobs=1\n")

    def wait(self) -> None:
        """Wait for the jobs in other processes. Ctrl-C interrupts each job, which can then be resumed.

        Raises:
            KeyboardInterrupt: the user or a job pressed Ctrl-C.
        """
        if self.num_processes:
            self._processes.wait()
        if self.worst_exit_code() == STOPPED:
            raise KeyboardInterrupt

    def worst_exit_code(self) -> int:
        """Return the largest exit code of all jobs."""
        path = self.folder / EXIT_CODES
        return max(map(int, path.read_text().split()), default=DONE) if path.exists() else DONE

    def close(self) -> None:
        """Interrupt the jobs that still run, and remove the file with the exit codes."""
        if self.num_processes:
            self._processes.interrupt()
        (self.folder / EXIT_CODES).unlink(missing_ok=True)

    def _as_job(self, cfg: DictConfig) -> DictConfig:
        """Return the settings without automatic reports, and without a console if jobs run at the same time."""
        with open_dict(cfg):
            if cfg.get("report") == "auto":
                cfg.report = False  # it takes as long as a small run; simulations.report draws it on request
            if self.is_parallel:
                cfg.callbacks.console = None
        return cfg

    def _record(self, code: int) -> None:
        file = os.open(self.folder / EXIT_CODES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, f"{code}\n".encode())
        finally:
            os.close(file)


def _import_framework(framework: str | None) -> None:
    set_environment(framework)
    if framework in ("torch", "jax"):
        with suppress(ImportError):  # the job reports it
            import_module(f"fedlearn.trainers.{framework}")


def count_processes(first: Job, num_jobs: int) -> int:
    """Return the number of processes for the jobs of a sweep; 0 if the launcher of Hydra runs them.

    Args:
        first: first job of the sweep, whose settings are the settings of the sweep.
        num_jobs: number of jobs of the sweep.

    Raises:
        SettingError: ``num_jobs`` is set, but this process cannot fork or a launcher runs the jobs.
    """
    cfg = first.cfg
    size = jobs_at_a_time(cfg.get("num_jobs"), cfg.engine, cfg.get("device") or "cpu")
    others = [first.choices.get(group, BASIC) for group in ("hydra/launcher", "hydra/sweeper")]
    if others != [BASIC, BASIC]:
        expected = f"null, because {' and '.join(name for name in others if name != BASIC)} runs the jobs"
        require(cfg.get("num_jobs") is None, "num_jobs", cfg.get("num_jobs"), expected, "num_jobs=null")
        return 0
    return 0 if size == 1 else min(size, num_jobs)


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
