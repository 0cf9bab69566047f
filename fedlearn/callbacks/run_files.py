"""Write the files of a run folder. They stay readable if the run is killed at any moment.

``metrics.jsonl`` grows by one line per round, which is flushed at once. Each other file is replaced as a whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.data_check import DATA_CHECK_FILE, check_as_json
from fedlearn.callbacks.formatting import header_lines
from fedlearn.callbacks.run_history import METRICS_FILE, finite_or_none, history_entry, to_json_line, truncate_history
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import ClientId, Evaluation, Round

PACKAGES = ("fedlearn", "numpy", "scikit-learn", "torch", "jax", "jaxlib", "flax", "optax", "opacus", "safetensors")
MAX_CLIENTS_SHOWN = 100
NUM_BINS = 10


class RunFiles(Callback):
    """Write ``metrics.jsonl``, ``clients.csv``, ``environment.json``, ``partition.json`` and ``summary.json``.

    The run folder is created if absent. Lines of rounds after ``RunInfo.start_round``, which a killed run left, are
    removed.

    Attributes:
        history: lines of all rounds so far, including the rounds before a resume.
    """

    ends_run_on_error = True

    def __init__(self) -> None:
        self.history: list[Mapping[str, Any]] = []
        self._run: RunInfo | None = None
        self._lines: TextIO | None = None

    def on_start(self, run: RunInfo) -> None:
        """Create the run folder, write the files that describe the run and its data, and open ``metrics.jsonl``."""
        folder, self._run = run.folder, run
        folder.mkdir(parents=True, exist_ok=True)
        self.history[:] = truncate_history(folder, run.start_round)
        _write_environment(folder / "environment.json", environment(run))
        if run.partition is not None:
            write_atomically(folder / "partition.json", json.dumps(run.partition, indent=1) + "\n")
        if run.data_check is not None:
            write_atomically(folder / DATA_CHECK_FILE, check_as_json(run.data_check))
        self._lines = (folder / METRICS_FILE).open("a", encoding="utf-8", newline="")

    def on_round(self, round: Round) -> None:
        """Append the line of the round. Write ``clients.csv`` if the round was evaluated."""
        if self._lines is None or self._run is None:
            raise RuntimeError("on_start was not called: call it before on_round")
        line = history_entry(round)
        self._lines.write(to_json_line(line) + "\n")
        self._lines.flush()
        self.history.append(line)
        if round.evaluation is not None:
            write_atomically(self._run.folder / "clients.csv", clients_table(round.evaluation, self._run))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` into the run folder."""
        if self._run is None:
            raise RuntimeError("on_start was not called: call it before on_end")
        write_summary(self._run.folder, summary)

    def close(self) -> None:
        """Close the file ``metrics.jsonl``, if it is open."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` into a run folder, or replace it.

    Raises:
        ValueError: the summary contains NaN or infinity.
    """
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def clients_table(evaluation: Evaluation, run: RunInfo) -> str:
    """Return an evaluation as CSV with one row per client.

    The columns are ``client``, ``name``, ``num_examples``, each metric, and ``personal_METRIC`` for personal models. A
    value that is not finite is an empty cell. Clients that never train have rows at the end, with 1 in the column
    ``held_out``.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = dict(evaluation.per_client)
    if evaluation.personal:
        columns |= {f"personal_{name}": values_K for name, values_K in evaluation.personal.per_client.items()}
    others = evaluation.held_out
    table.writerow(["client", "name", "num_examples", *columns, *(["held_out"] if others else [])])
    for k, client in enumerate(evaluation.clients):
        values = [finite_or_none(values_K[k]) for values_K in columns.values()]
        row = [client, run.name(client), int(evaluation.num_examples_K[k]), *values]
        table.writerow([*row, *([0] if others else [])])
    if others is not None:
        cells = {name: values_K for name, values_K in others.per_client.items() if name in columns}
        for k, client in enumerate(others.clients):
            values = [finite_or_none(cells[name][k]) if name in cells else None for name in columns]
            table.writerow([client, run.name(client), int(others.num_examples_K[k]), *values, 1])
    return text.getvalue()


def environment(run: RunInfo) -> dict[str, Any]:
    """Return header, plan, machine, package versions, Git commit and commands of a run, for ``environment.json``."""
    return {
        "header": dict(header_lines(run)),
        "target": dict(run.target),
        "metric": run.main_metric,
        "rounds": run.rounds,
        "epsilon_limit": run.privacy.get("budget"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": installed_versions(PACKAGES),
        "git_commit": _commit(Path(__file__)),
        "command": shlex.join(sys.argv),
        "rerun_command": run.rerun_command,
        "start_round": run.start_round,
    }


def _write_environment(path: Path, current: Mapping[str, Any]) -> None:
    """Write the environment of a new run, or append it below ``resumed``, because the machine may have changed."""
    if path.exists() and current["start_round"]:
        first = json.loads(path.read_text(encoding="utf-8"))
        current = first | {"resumed": [*first.get("resumed", []), current]}
    write_atomically(path, json.dumps(current, indent=2) + "\n")


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return package -> version, for the packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _commit(source: Path) -> str | None:
    """Return the Git commit of the checkout that tracks ``source``, or None. Changed files add ``-dirty`` to it."""
    git = ["git", "-C", str(source.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], capture_output=True, check=True, timeout=10)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, check=True, timeout=10, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def partition_summary(data: FederatedData, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the number of training examples by client and class, for figures. At most 100 clients are included.

    Args:
        data: federated data.
        classes: names of the classes; default their numbers.

    Returns:
        - ``kind``: ``labels`` for classes, or ``targets`` for bins of a numeric target.
        - ``columns``: names of the classes, or the B + 1 edges of B equally wide bins.
        - ``num_clients``: size of the population.
        - ``clients``: for each of the first 100 clients ``client``, ``name``, ``num_examples`` and ``counts``, the
          number of examples by class or bin.
    """
    shown = [int(data.clients[k]) for k in range(min(len(data.clients), MAX_CLIENTS_SHOWN))]
    targets = {client: np.asarray(data.train(client).y) for client in shown}
    labelled = data.task.has_classes or data.task.decide is not None
    if not labelled:  # a bin counts the first of several values, e.g. the time of a survival
        targets = {client: y.T[0] if y.ndim == 2 else y.ravel() for client, y in targets.items()}
    count, columns = _by_label(data, classes) if labelled else _by_bin(targets)
    return {
        "kind": "labels" if labelled else "targets",
        "columns": columns,
        "num_clients": len(data.clients),
        "clients": [
            {"client": client, "name": data.name(client), "num_examples": len(y), "counts": count(y).tolist()}
            for client, y in targets.items()
        ],
    }


def _by_label(data: FederatedData, classes: Sequence[str]) -> tuple[Any, list[str]]:
    num_classes = data.num_classes
    names = list(classes) if len(classes) == num_classes else [str(number) for number in range(num_classes)]
    if not data.task.has_classes:  # one column of 0 and 1 for each label
        return lambda y: y.sum(axis=0), names
    return lambda y: np.bincount(y[y >= 0].astype(np.int64), minlength=num_classes), names


def _by_bin(targets: Mapping[ClientId, np.ndarray]) -> tuple[Any, list[float]]:
    pooled = np.concatenate([*targets.values(), np.zeros(0)])  # an empty population has no targets
    edges = np.histogram_bin_edges(pooled, bins=NUM_BINS)
    return lambda y: np.histogram(y, bins=edges)[0], edges.tolist()
