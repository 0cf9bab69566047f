"""Run rows of published tables, store their results, and write the page."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE
from fedlearn.errors import SettingError, did_you_mean
from fedlearn.runner.start import main as run_experiment
from simulations.published import TABLES, all_rows
from simulations.published.records import Row, Table
from simulations.published.results_page import gate_of, result_file, results_page
from simulations.published.stored_results import SeedResult, read_results, read_run, store_results

PAGE, RESULTS = "results.md", "results"


def list_rows() -> int:
    """Print the name and the command of each row. Return 0."""
    for name, row in all_rows().items():
        sys.stdout.write(f"{name}\n  {row.command}\n")
    return DONE


def write_page(docs: Path) -> int:
    """Write the page, and return 0."""
    write_atomically(docs / PAGE, results_page(docs / RESULTS))
    sys.stdout.write(f"wrote {docs / PAGE}\n")
    return DONE


def run_rows(names: Sequence[str], *, seeds: Sequence[int] | None, again: bool, docs: Path, runs: Path) -> int:
    """Run the seeds of rows, and store each result at once.

    Args:
        names: names of rows or tables.
        seeds: seeds to run; None runs all seeds of the rows.
        again: True also runs seeds that have a stored result, and replaces it.
        docs: folder with the stored results.
        runs: folder for the run folders. A run folder is deleted after its result is stored.

    Returns:
        0, or the exit code of the first run that failed.

    Raises:
        SettingError: a name or a seed is unknown.
    """
    for table, row in [pair for name in names for pair in _find(name)]:
        file = result_file(table, row, docs / RESULTS)
        for seed in _chosen(row, seeds):
            known = {result.seed for result in read_results(row, file)}
            if seed in known and not again:
                continue
            if failed := _run_seed(row, seed, runs / table.name / f"{row.name}_{seed}", file):
                return failed
    return DONE


def _processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended, seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _run_seed(row: Row, seed: int, folder: Path, file: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    words = [*row.settings, f"seed={seed}", f"hydra.run.dir={folder}", "callbacks.console=null"]
    since = _processor_seconds()
    if failed := run_experiment(words):
        return failed
    result = read_run(row, seed, folder, processor_seconds=_processor_seconds() - since)
    stored = {old.seed: old for old in read_results(row, file)}
    store_results(row, [*({**stored, seed: result}).values()], file)
    shutil.rmtree(folder, ignore_errors=True)
    _report(row, result, stored.get(seed))
    return DONE


def _report(row: Row, result: SeedResult, before: SeedResult | None) -> None:
    """Print the values of a run, and compare its parameters with the stored result."""
    values = " · ".join(f"{name} {value:.2f}" for name, value in result.values.items() if value is not None)
    gates = " · ".join(gate_of(measure, [result]) for measure in row.measures if measure.published)
    same = "" if before is None else " · same parameters" * (before.parameters_sha256 == result.parameters_sha256)
    changed = " · other parameters than before" if before is not None and not same else ""
    sys.stdout.write(f"{row.label}, seed {result.seed}: {values} · {gates} · {result.seconds:.0f} s{same}{changed}\n")
    sys.stdout.flush()


def _find(name: str) -> list[tuple[Table, Row]]:
    rows = [(table, row) for table in TABLES.values() for row in table.rows]
    found = [(table, row) for table, row in rows if name in (table.name, f"{table.name}/{row.name}")]
    if not found:
        known = [*TABLES, *all_rows()]
        guess = did_you_mean(name, known) or "flamby_heart/fedavg"
        raise SettingError("--run", name, "a row or a table of simulations.results --list", f"--run {guess}")
    return found


def _chosen(row: Row, seeds: Sequence[int] | None) -> Sequence[int]:
    unknown = [seed for seed in seeds or [] if seed not in row.seeds]
    if unknown:
        expected = f"seeds of the row {row.name}: {', '.join(map(str, row.seeds))}"
        raise SettingError("--seeds", unknown[0], expected, f"--seeds {row.seeds[0]}")
    return row.seeds if seeds is None else seeds
