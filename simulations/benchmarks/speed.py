"""``python -m simulations.benchmarks.speed``: how fast a round is, ours against others'."""

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
    """Measure, show, save; the exit code is 0 done, 2 bad setting, 3 nothing measured, 130 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h", "help"} & set(argv):
        sys.stdout.write(HELP)
        return DONE
    try:
        return compare(read(argv))
    except FedlearnError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_SETTING
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return STOPPED


def compare(settings: Settings) -> int:
    """Run everything, telling of each process as it ends."""
    folder = _claimed(settings)
    sys.stdout.write(f"{settings.workload}\n{machine()}\n")
    runs = []
    for run in run_all(settings):
        runs.append(run)
        told = run.error or f"{run.seconds_per_round:.4g} s a round"
        sys.stdout.write(f"  repeat {run.repeat}  {run.framework} {run.system}: {told}\n")
        sys.stdout.flush()
        _save(folder, runs, settings)
    _show(runs, settings)
    sys.stdout.write(f"\nsaved     {folder}\n")
    return DONE if any(not run.error for run in runs) else FAILED


def machine() -> str:
    """One line on where this was measured."""
    return f"{_processor()}, {num_cores()} cores, {platform.system()}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _claimed(settings: Settings) -> Path:
    """A folder of its own, or the one that was asked for."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    chosen = settings.out or Path("outputs/benchmarks", settings.workload.name, stamp)
    for number in count(1):
        folder = chosen if number == 1 else chosen.with_name(f"{chosen.name}_{number}")
        try:
            folder.mkdir(parents=True, exist_ok=bool(settings.out))
            return folder
        except FileExistsError:
            if settings.out:
                raise FedlearnError(f"{folder} is a file\n  try       out=DIR") from None
        except OSError as error:
            raise FedlearnError(f"{folder} cannot be written: {error.strerror}\n  try       out=DIR") from error
    raise AssertionError("count() ends")


def _save(folder: Path, runs: Sequence[Run], settings: Settings) -> None:
    """After every process, so that a comparison that is stopped leaves what it knows."""
    result: dict[str, Any] = {
        "workload": str(settings.workload),
        "sizes": settings.sizes,
        "machine": machine(),
        "versions": installed_versions(PACKAGES),
        "runs": [run.as_json() for run in runs],
        "ratios": [
            {"framework": r.framework, "ours_over": r.other, "values": r.values, "best": r.best}
            for r in tables.ratios(runs)
        ],
    }
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "results.md").write_text(tables.markdown(runs, settings.workload, machine=machine()))
    _draw(folder / "rounds.png", runs, settings)


def _draw(path: Path, runs: Sequence[Run], settings: Settings) -> None:
    """The figure, where matplotlib is installed."""
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
