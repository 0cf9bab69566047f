"""Cost of privacy: the main metric of runs against their epsilon."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlearn.callbacks import figure_style
from fedlearn.callbacks.figure_style import DOTS_PER_INCH
from fedlearn.callbacks.formatting import format_metric
from fedlearn.callbacks.run_history import METRICS_FILE
from fedlearn.callbacks.run_results import read_run
from fedlearn.callbacks.tables import print_table
from fedlearn.core.command_line import DONE
from fedlearn.core.metrics import higher_is_better
from fedlearn.errors import DataError

FIGURE_FILE = "privacy_utility.png"
COLORS = (figure_style.POOLED_COLOR, figure_style.WORST_COLOR, "#009E73", "#CC79A7", "#E69F00")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Result of one run.

    Attributes:
        series: scenario, strategy and mechanism; runs of one series are compared.
        epsilon: claimed epsilon after the last round; None without protection.
        metric: name of the main metric.
        value: final value of the main metric.
    """

    series: str
    epsilon: float | None
    metric: str
    value: float


def read_points(folders: Sequence[Path]) -> list[Point]:
    """Read all finished runs below some folders.

    Raises:
        DataError: There is no finished run, or the runs have different metrics.
    """
    runs = [_read_point(path.parent) for folder in folders for path in sorted(folder.rglob(METRICS_FILE))]
    finished = [point for point in runs if point is not None]
    if not finished:
        where = ", ".join(str(folder) for folder in folders)
        raise DataError(
            f"{where} has no finished run\n  expected  folders of runs\n"
            "  advice    the folder of a sweep, e.g. multirun/..."
        )
    metrics = sorted({point.metric for point in finished})
    if len(metrics) > 1:
        raise DataError(
            f"the runs have different metrics: {', '.join(metrics)}\n  expected  runs with one metric\n"
            "  advice    the folders of one task"
        )
    return finished


def _read_point(folder: Path) -> Point | None:
    run = read_run(folder)
    value, privacy = run.summary["final"].get(run.main_metric), run.summary.get("privacy")
    if value is None or (privacy and privacy["epsilon"] is None):
        return None
    kind = privacy["kind"] if privacy else "no protection"
    series = " · ".join([str(run.summary.get("scenario", "")), str(run.summary.get("strategy", "")), kind])
    return Point(
        series=series, epsilon=privacy["epsilon"] if privacy else None, metric=run.main_metric, value=float(value)
    )


def group_by_epsilon(points: Sequence[Point]) -> Mapping[str, Mapping[float | None, list[float]]]:
    """Return the values of each series at each epsilon. Epsilon is rounded to two digits, to group the seeds."""
    grouped: dict[str, dict[float | None, list[float]]] = {}
    for point in points:
        epsilon = None if point.epsilon is None else float(f"{point.epsilon:.2g}")
        grouped.setdefault(point.series, {}).setdefault(epsilon, []).append(point.value)
    return grouped


def plot_privacy_utility(points: Sequence[Point]) -> figure_style.Figure:
    """Draw the metric against epsilon: each run, and the means over seeds. More private runs are on the left."""
    metric = points[0].metric
    figure = figure_style.new_figure(0.75 * figure_style.WIDTH_INCHES, 3.4)
    axis = figure.subplots()
    for (series, values), color in zip(group_by_epsilon(points).items(), _colors(), strict=False):
        unprotected, epsilons = values.get(None), sorted(epsilon for epsilon in values if epsilon is not None)
        if unprotected is not None:
            axis.axhline(float(np.mean(unprotected)), color=color, linewidth=1, linestyle=(0, (4, 2)), label=series)
        if epsilons:
            means = [np.mean(values[epsilon]) for epsilon in epsilons]
            axis.plot(epsilons, means, color=color, linewidth=1.8, marker="o", markersize=4, label=series)
            for epsilon in epsilons:
                axis.plot([epsilon] * len(values[epsilon]), values[epsilon], ".", color=color, alpha=0.35, markersize=5)
    epsilons = sorted({e for values in group_by_epsilon(points).values() for e in values if e is not None})
    axis.set_xscale("log")
    if epsilons:
        axis.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axis.set_xticks([], minor=True)
    axis.set(
        title="Cost of privacy", xlabel="epsilon (smaller is more private)", ylabel=figure_style.metric_name(metric)
    )
    if metric == "accuracy":
        axis.yaxis.set_major_formatter(lambda share, place: f"{100 * share:g} %")
    axis.grid(axis="y")
    axis.legend(loc="lower right" if higher_is_better(metric) else "upper right")
    return figure


def _colors() -> Sequence[str]:
    return COLORS * 10


def table_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Return a row for each setting: series, epsilon, mean, standard deviation, number of runs."""
    metric = points[0].metric
    rows: list[tuple[str, ...]] = [("series", "epsilon", metric, "std", "runs")]
    for series, values in group_by_epsilon(points).items():
        for epsilon in sorted(values, key=lambda epsilon: (epsilon is not None, epsilon)):
            label = "–" if epsilon is None else f"{epsilon:g}"
            mean, std = (format_metric(metric, float(f(values[epsilon]))) for f in (np.mean, np.std))
            rows.append((series, label, mean, std, str(len(values[epsilon]))))
    return rows


def write_privacy_utility(folders: Sequence[Path]) -> int:
    """Print the table of all finished runs, draw the figure into the first folder, and return the exit code.

    Raises:
        DataError: There is no finished run, or the runs have different metrics.
    """
    points = read_points(folders)
    with figure_style.style():
        plot_privacy_utility(points).savefig(folders[0] / FIGURE_FILE, dpi=DOTS_PER_INCH, facecolor="white")
    print_table(table_rows(points))
    sys.stdout.write(f" saved     {folders[0] / FIGURE_FILE}\n")
    return DONE
