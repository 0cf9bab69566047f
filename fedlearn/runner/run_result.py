"""Read the result of a run in Python: metrics, model, predictions and figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from fedlearn.callbacks.formatting import format_metric
from fedlearn.callbacks.report import read_run
from fedlearn.callbacks.run_history import read_history
from fedlearn.errors import FedlearnError, MissingExtra
from fedlearn.loop.protocols import Trainer
from fedlearn.runner.trained_model import TrainedModel, load_trained_model

COLUMNS = ("round", "seconds", "epsilon", "cohort", "num_updates", "bytes_up", "bytes_down")


class RunFailed(FedlearnError):
    """Report a run that failed after its start.

    Attributes:
        folder: run folder. A call of `fedlearn.run` with ``resume`` continues after the last completed round.
    """

    exit_code = 3

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a run. It reads the files of the run folder.

    Attributes:
        folder: run folder.
        trainer: trainer of the run; None builds the network from the run folder.
        allow_targets: modules of the user with the code of the model.
    """

    folder: Path
    trainer: Trainer | None = None
    allow_targets: tuple[str, ...] = ()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Content of ``summary.json``: status, final and best metrics, privacy, bytes and seconds."""
        return dict(json.loads((self.folder / "summary.json").read_text(encoding="utf-8")))

    @property
    def status(self) -> str:
        """``done``, ``early_stopped``, ``budget_exhausted`` or ``stopped`` (after Ctrl-C)."""
        return str(self.summary["status"])

    @cached_property
    def history(self) -> tuple[dict[str, Any], ...]:
        """Lines of ``metrics.jsonl``, one mapping for each round."""
        return tuple(map(dict, read_history(self.folder)))

    @property
    def metrics(self) -> Any:
        """Metrics of all rounds, a ``pandas.DataFrame`` with one row for each round.

        Metrics on the pooled held-out examples have their plain names, e.g. ``accuracy``. ``train_`` marks metrics of
        local training. ``accuracy_mean``, ``accuracy_std`` and ``accuracy_worst10`` are values over clients. Rounds
        without evaluation have NaN.

        Raises:
            MissingExtra: pandas is not installed.
        """
        return _data_frame([_row(line) for line in self.history])

    @property
    def clients(self) -> Any:
        """Metrics of each client after the last evaluation, a ``pandas.DataFrame``.

        Raises:
            MissingExtra: pandas is not installed.
        """
        return _data_frame(read_run(self.folder).clients)

    @cached_property
    def trained_model(self) -> TrainedModel:
        """Model after the last round, as `fedlearn.load` returns it."""
        return load_trained_model(self.folder, allow_targets=self.allow_targets, trainer=self.trainer)

    @property
    def model(self) -> Any:
        """Module with the trained weights: an ``nn.Module``, or a pair of a flax module and its variables."""
        return self.trained_model.module

    def predict(self, data: Any, **options: Any) -> Any:
        """Return one prediction for each example; see `fedlearn.load`."""
        return self.trained_model.predict(data, **options)

    def predict_proba(self, data: Any, **options: Any) -> Any:
        """Return the probability of each class, ``(N, C)``; see `fedlearn.load`."""
        return self.trained_model.predict_proba(data, **options)

    def plot(self, metric: str | None = None) -> Any:
        """Return a figure of matplotlib with the loss and one metric over rounds.

        Args:
            metric: name of the metric; None is the main metric of the run.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from fedlearn.callbacks import figures
        from fedlearn.callbacks.figure_style import style

        with style():
            return figures.convergence(
                self.history, metric or self.summary["metric"], self.summary.get("baselines", {})
            )

    def __repr__(self) -> str:
        return f"RunResult({self._text}, folder={str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Return the final metrics as a table, for notebooks."""
        final = self.summary["final"]
        cells = "".join(f"<td>{escape(format_metric(name, value))}</td>" for name, value in final.items())
        names = "".join(f"<th>{escape(name)}</th>" for name in final)
        text = escape(f"{self.status} after {self.summary['rounds']} rounds, {self.folder}")
        return f"<table><caption>{text}</caption><tr>{names}</tr><tr>{cells}</tr></table>"

    @property
    def _text(self) -> str:
        metric, final = self.summary["metric"], self.summary["final"]
        return (
            f"{self.status} after {self.summary['rounds']} rounds, {metric} {format_metric(metric, final.get(metric))}"
        )


def _row(line: dict[str, Any]) -> dict[str, Any]:
    clients = {
        f"{name}_{key}": value for name, values in (line["clients"] or {}).items() for key, value in values.items()
    }
    train = {f"train_{name}": value for name, value in line["train"].items()}
    return {**{name: line.get(name) for name in COLUMNS[:1]}, **(line["test"] or {}), **train, **clients} | {
        name: line.get(name) for name in COLUMNS[1:]
    }


def _data_frame(rows: Any) -> Any:
    try:
        import pandas  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise MissingExtra("result.metrics", "data") from error
    return pandas.DataFrame(rows)
