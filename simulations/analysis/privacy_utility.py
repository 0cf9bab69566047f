"""The price of privacy: the main metric of runs against their epsilon."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlearn.callbacks import figures
from fedlearn.callbacks.formatting import format_metric
from fedlearn.callbacks.report import DOTS_PER_INCH, read_run
from fedlearn.callbacks.run_history import METRICS_FILE
from fedlearn.callbacks.tables import print_table
from fedlearn.core.command_line import DONE
from fedlearn.core.metrics import higher_is_better
from fedlearn.errors import DataError

FIGURE_FILE = "privacy_utility.png"
COLORS = (figures.POOLED_COLOR, figures.WORST_COLOR, "#009E73", "#CC79A7", "#E69F00")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run.

    Attributes:
        series: what it is compared within: scenario, strategy and mechanism.
        epsilon: that it claims in the end; None without protection.
        metric: the main one's name.
        value: of that, in the end.
    """

    series: str
    epsilon: float | None
    metric: str
    value: float


def read_points(folders: Sequence[Path]) -> list[Point]:
    """All finished runs below some folders.

    Raises:
        DataError: there are none, or they are not about one metric.
    """
    found = [_point(path.parent) for folder in folders for path in sorted(folder.rglob(METRICS_FILE))]
    finished = [point for point in found if point is not None]
    if not finished:
        where = ", ".join(str(folder) for folder in folders)
        raise DataError(f"{where} holds no finished run\n  try       the folder of a sweep, e.g. multirun/...")
    metrics = sorted({point.metric for point in finished})
    if len(metrics) > 1:
        raise DataError(f"runs about {' and '.join(metrics)} cannot share a picture\n  try       one task at a time")
    return finished


def _point(folder: Path) -> Point | None:
    run = read_run(folder)
    value, promise = run.summary["final"].get(run.main_metric), run.summary.get("privacy")
    if value is None or (promise and promise["epsilon"] is None):
        return None
    kind = promise["kind"] if promise else "no protection"
    series = " · ".join([str(run.summary.get("scenario", "")), str(run.summary.get("strategy", "")), kind])
    return Point(
        series=series, epsilon=promise["epsilon"] if promise else None, metric=run.main_metric, value=float(value)
    )


def group_by_epsilon(points: Sequence[Point]) -> Mapping[str, Mapping[float | None, list[float]]]:
    """Values of each series at each epsilon, to two digits of it: seeds of one setting belong together."""
    grouped: dict[str, dict[float | None, list[float]]] = {}
    for point in points:
        place = None if point.epsilon is None else float(f"{point.epsilon:.2g}")
        grouped.setdefault(point.series, {}).setdefault(place, []).append(point.value)
    return grouped


def plot_privacy_utility(points: Sequence[Point]) -> figures.Figure:
    """The metric against epsilon, smaller and so more private to the left: each run, and means over seeds."""
    metric = points[0].metric
    figure = figures.new_figure(0.75 * figures.WIDTH_INCHES, 3.4)
    axis = figure.subplots()
    for (series, values), color in zip(group_by_epsilon(points).items(), _colors(), strict=False):
        bare, places = values.get(None), sorted(place for place in values if place is not None)
        if bare is not None:
            axis.axhline(float(np.mean(bare)), color=color, linewidth=1, linestyle=(0, (4, 2)), label=series)
        if places:
            means = [np.mean(values[place]) for place in places]
            axis.plot(places, means, color=color, linewidth=1.8, marker="o", markersize=4, label=series)
            for place in places:
                axis.plot([place] * len(values[place]), values[place], ".", color=color, alpha=0.35, markersize=5)
    places = sorted({place for values in group_by_epsilon(points).values() for place in values if place is not None})
    axis.set_xscale("log")
    if places:
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.set_xticks([], minor=True)
    axis.set(title="What privacy costs", xlabel="epsilon (smaller is more private)", ylabel=figures.metric_name(metric))
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
        for place in sorted(values, key=lambda place: (place is not None, place)):
            epsilon = "–" if place is None else f"{place:g}"
            mean, std = (format_metric(metric, float(f(values[place]))) for f in (np.mean, np.std))
            rows.append((series, epsilon, mean, std, str(len(values[place]))))
    return rows


def write_privacy_utility(folders: Sequence[Path]) -> int:
    """Print the table of all finished runs, and draw the figure into the first folder; return the exit code.

    Raises:
        DataError: there are no runs, or they have different metrics.
    """
    points = read_points(folders)
    with figures.style():
        plot_privacy_utility(points).savefig(folders[0] / FIGURE_FILE, dpi=DOTS_PER_INCH, facecolor="white")
    print_table(table_rows(points))
    sys.stdout.write(f" saved     {folders[0] / FIGURE_FILE}\n")
    return DONE
