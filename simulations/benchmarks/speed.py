"""``python -m simulations.benchmarks.speed``: compare the speed of fedlearn with other systems."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from fedlearn.callbacks.run_files import installed_versions
from fedlearn.callbacks.tables import print_table
from fedlearn.errors import FedlearnError
from simulations.benchmarks import tables
from simulations.benchmarks.measure import Run, run_all
from simulations.benchmarks.processes import num_cores
from simulations.benchmarks.settings import HELP, Settings, read

DONE, BAD_SETTING, FAILED, STOPPED = 0, 2, 3, 130
PACKAGES = ("fedlearn", "numpy", "torch", "jax", "flax", "flwr", "ray", "pfl")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save, and return the exit code: 0 done, 2 bad setting, 3 no measurement, 130 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h", "help"} & set(argv):
        sys.stdout.write(HELP)
        return DONE
    try:
        return compare(read(argv))
    except FedlearnError as error:
        sys.stderr.write(f"{error.on_command_line()}\n")
        return BAD_SETTING
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return STOPPED


def compare(settings: Settings) -> int:
    """Run all systems, and print a line after each process. Return the exit code."""
    folder = _create_folder(settings)
    sys.stdout.write(f"{settings.workload}\n{machine()}\n")
    runs = []
    for run in run_all(settings):
        runs.append(run)
        outcome = run.error or f"{run.seconds_per_round:.4g} s per round"
        sys.stdout.write(f"  repeat {run.repeat}  {run.framework} {run.system}: {outcome}\n")
        sys.stdout.flush()
        _save(folder, runs, settings)
    _show(runs, settings)
    sys.stdout.write(f"\nsaved     {folder}\n")
    return DONE if any(not run.error for run in runs) else FAILED


def machine() -> str:
    """Describe this machine in one line."""
    return f"{_processor()}, {num_cores()} cores, {platform.system()}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _create_folder(settings: Settings) -> Path:
    """Create the folder ``out``, or a new folder if ``out`` is not set."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    chosen = settings.out or Path("outputs/benchmarks", settings.workload.name, stamp)
    for number in count(1):
        folder = chosen if number == 1 else chosen.with_name(f"{chosen.name}_{number}")
        try:
            folder.mkdir(parents=True, exist_ok=bool(settings.out))
            return folder
        except FileExistsError:
            if settings.out:
                raise FedlearnError(f"out={folder} is a file\n  expected  a folder\n  try       out=timings") from None
        except OSError as error:
            problem = f"folder {folder} cannot be created: {error.strerror}"
            raise FedlearnError(
                f"{problem}\n  expected  a folder with write access\n  try       out=timings"
            ) from error
    raise AssertionError("count() ends")


def _save(folder: Path, runs: Sequence[Run], settings: Settings) -> None:
    """Save the results so far. It runs after every process, so that a stopped comparison keeps its results."""
    result: dict[str, Any] = {
        "workload": str(settings.workload),
        "sizes": settings.sizes,
        "machine": machine(),
        "versions": installed_versions(PACKAGES),
        "runs": [run.as_json() for run in runs],
        "ratios": [
            {
                "framework": r.framework,
                "ours_over": r.other,
                "values": r.values,
                "best": r.best,
                "processor": r.processor,
            }
            for r in tables.ratios(runs)
        ],
    }
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "results.md").write_text(tables.markdown(runs, settings.workload, machine=machine()))
    _draw(folder / "rounds.png", runs, settings)


def _draw(path: Path, runs: Sequence[Run], settings: Settings) -> None:
    """Draw the figure if matplotlib is installed."""
    try:
        from simulations.benchmarks.picture import draw
    except ImportError:
        return
    draw(path, runs, title=str(settings.workload))


def _show(runs: Sequence[Run], settings: Settings) -> None:
    rows = tables.rows(runs, settings.workload)
    failed = [" ".join(row[:2]) + ": " + row[2] for row in rows if len(row) < len(tables.COLUMNS)]
    shown = [row if len(row) == len(tables.COLUMNS) else (*row[:2], "-") for row in rows]
    sys.stdout.write(f"{settings.workload}\n")
    print_table([tables.COLUMNS, *shown], num_text_columns=2)
    sys.stdout.writelines(f"{line}\n" for line in (*failed, *tables.ratios(runs), *tables.variants(runs)))


if __name__ == "__main__":
    sys.exit(main())
