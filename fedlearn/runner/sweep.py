"""Run the jobs of a sweep: one run folder for each job, and the exit code of the worst job.

A launcher such as joblib runs the jobs in other processes. So each job adds its exit code to a file of the sweep.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, open_dict

from fedlearn.callbacks.formatting import format_metric
from fedlearn.core.command_line import DONE, FAILED, STOPPED, exit_code
from fedlearn.runner.compat import job_overrides, run_folder
from fedlearn.runner.compose import Job, setting_of
from fedlearn.runner.rounds import RunOutcome

EXIT_CODES = ".exit_codes"  # file in the folder of a sweep while it runs
BASIC_LAUNCHER = "basic"  # Hydra's name of the launcher that runs one job after another
MAX_FOLDER_NAME = 100  # characters; the number of the job at the start keeps names distinct


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Function of Hydra for the jobs of a sweep. A failed job does not stop the others; Ctrl-C does.

    Args:
        folder: folder of the sweep.
        fixed: settings with the same value in all jobs.
        run: function that runs a job in its folder.
        is_parallel: True if a launcher runs several jobs at the same time. Each job then prints one line.
    """

    folder: Path
    fixed: frozenset[str]
    run: Callable[[Job], RunOutcome]
    is_parallel: bool

    def __call__(self, cfg: DictConfig) -> float:
        """Run one job, and return its main metric."""
        created, outcome = run_folder(), RunOutcome(exit_code=FAILED)
        varied = [override for override in job_overrides() if setting_of(override) not in self.fixed]
        name = f"job {created.name}: {', '.join(varied) or 'no setting varies'}"
        job = Job(cfg=self._quiet(cfg), folder=job_folder(created, varied), chosen=True)
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

    def worst_exit_code(self) -> int:
        """Return the largest exit code of all jobs."""
        path = self.folder / EXIT_CODES
        return max(map(int, path.read_text().split()), default=DONE) if path.exists() else DONE

    def close(self) -> None:
        """Remove the file with the exit codes."""
        (self.folder / EXIT_CODES).unlink(missing_ok=True)

    def _quiet(self, cfg: DictConfig) -> DictConfig:
        """Return the settings without a console if other jobs print at the same time."""
        if self.is_parallel:
            with open_dict(cfg):
                cfg.callbacks.console = None
        return cfg

    def _record(self, code: int) -> None:
        file = os.open(self.folder / EXIT_CODES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, f"{code}\n".encode())
        finally:
            os.close(file)


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
