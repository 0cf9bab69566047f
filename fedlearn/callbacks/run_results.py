"""Read the files of a run folder, for reports and comparisons."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.callbacks.evaluation_file import NOT_WRITTEN, read_evaluation
from fedlearn.callbacks.run_history import METRICS_FILE, best_metrics, final_metrics, read_history, totals
from fedlearn.errors import DataError


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Contents of the files of a run folder. A missing file is empty.

    Attributes:
        history: lines of ``metrics.jsonl``.
        summary: content of ``summary.json``. Without this file, a summary of the history with the status
            ``unfinished``.
        environment: content of ``environment.json``.
        clients: rows of ``clients.csv``, with None for undefined metrics.
        partition: content of ``partition.json``.
        config: text of ``config.yaml``.
        evaluation: content of ``evaluation.json``, see `fedlearn.callbacks.evaluation_file`.
    """

    history: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    clients: Sequence[Mapping[str, Any]]
    partition: Mapping[str, Any]
    config: str
    evaluation: Mapping[str, Any] = field(default_factory=lambda: {"missing": NOT_WRITTEN})

    @property
    def main_metric(self) -> str:
        """Name of the main metric of the run."""
        final = self.summary["final"]
        return self.summary.get("metric") or next((m for m in ("rmse", "hr@10") if m in final), "accuracy")

    @property
    def target(self) -> Mapping[str, Any]:
        """Name, unit and classes of the target; empty if unknown."""
        return self.environment.get("target") or {}

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; empty if unknown."""
        return self.target.get("classes", ())

    @property
    def lower_is_better(self) -> Sequence[str]:
        """Metrics of the user whose low values are good."""
        return next((line["lower_is_better"] for line in self.history if "lower_is_better" in line), ())

    @property
    def baselines(self) -> Mapping[str, Any]:
        """Name -> metrics of each baseline that was trained, see `fedlearn.runner.baselines.train_baselines`."""
        return self.summary.get("baselines", {})


def read_run(folder: Path) -> RunResults:
    """Return the contents of a run folder.

    Raises:
        DataError: the folder is not a run folder.
    """
    if not (folder / METRICS_FILE).is_file():
        raise DataError(
            f"{folder} is not a run folder: it has no {METRICS_FILE}\n  advice    the folder that a run prints as saved"
        )
    history = read_history(folder)
    unfinished = {
        "status": "unfinished",
        "reason": "",
        "final": final_metrics(history),
        "best": best_metrics(history),
        **totals(history),
    }
    unfinished["rounds"] = history[-1]["round"] if history else 0
    return RunResults(
        history=history,
        summary=_read_json(folder / "summary.json") or unfinished,
        environment=_read_json(folder / "environment.json"),
        clients=_read_clients(folder / "clients.csv"),
        partition=_read_json(folder / "partition.json"),
        config=_read_text(folder / "config.yaml"),
        evaluation=read_evaluation(folder),
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(_read_text(path) or "{}")


def _read_clients(path: Path) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(_read_text(path)))
    return [{key: value if key == "name" else _number(value) for key, value in row.items()} for row in rows]


def _number(text: str) -> int | float | None:
    if not text:
        return None
    value = float(text)
    return int(value) if text.lstrip("-").isdigit() and math.isfinite(value) else value
