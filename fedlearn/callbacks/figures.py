"""Draw the figures of a run: convergence, traffic, metrics of the clients, and the partition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.callbacks.figure_style import (
    CENTRAL_COLOR,
    CLIENTS_COLOR,
    LOCAL_COLOR,
    POOLED_COLOR,
    TEXT_COLOR,
    WIDTH_INCHES,
    WORST_COLOR,
    annotate_cells,
    format_as_percent,
    metric_name,
    new_figure,
    short_name,
    sparse_ticks,
    to_numbers,
)
from fedlearn.callbacks.formatting import format_metric
from fedlearn.callbacks.run_history import History
from fedlearn.core.metrics import higher_is_better

if TYPE_CHECKING:
    from fedlearn.callbacks.figure_style import Axes, Figure

BYTE_UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes"))
MAX_NAMED_BARS = 40  # with more bars, names are too small to read
MAX_ANNOTATED_CELLS = (24, 12)  # rows and columns; cells of larger heat maps are too small for numbers


def convergence(history: History, main_metric: str, baselines: Mapping[str, Any] = MappingProxyType({})) -> Figure:
    """Draw loss and main metric over rounds, on the pooled test examples and over clients.

    Args:
        history: lines of the run; at least one has an evaluation.
        main_metric: name of the metric of the second panel.
        baselines: name -> metrics of a baseline, drawn as horizontal lines; see `fedlearn.runner.baselines`.
    """
    return _two_curves(history, main_metric, baselines, over="round")


def time_to_accuracy(history: History, main_metric: str, baselines: Mapping[str, Any] = MappingProxyType({})) -> Figure:
    """Draw loss and main metric over the virtual clock, or over the wall-clock time of a deployment.

    The arguments are as in `convergence`. Each evaluated line of the history needs ``clock``.
    """
    return _two_curves(history, main_metric, baselines, over="clock")


def _two_curves(history: History, main: str, baselines: Mapping[str, Any], *, over: str) -> Figure:
    figure = new_figure(WIDTH_INCHES, 3.3)
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, ("loss", main), strict=True):
        _curves(axis, [line for line in history if line["test"]], metric, over)
        for (name, baseline), color in zip(baselines.items(), (CENTRAL_COLOR, LOCAL_COLOR), strict=False):
            value = baseline["test"].get(metric)
            if value is not None:
                axis.axhline(value, color=color, linewidth=1.2, linestyle=":", label=f"{name} training")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3 if baselines else 4, columnspacing=1.6, handlelength=1.6
    )
    return figure


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit for the axis of a duration in seconds, and the length of the unit in seconds.

    >>> time_unit(90), time_unit(600), time_unit(86400)
    (('seconds', 1.0), ('minutes', 60.0), ('hours', 3600.0))
    """
    return ("seconds", 1.0) if seconds < 120 else ("minutes", 60.0) if seconds < 7200 else ("hours", 3600.0)


def _curves(axis: Axes, evaluated: History, metric: str, over: str) -> None:
    unit, size = ("", 1) if over == "round" else time_unit(evaluated[-1]["clock"])
    rounds = [line[over] / size if unit else line[over] for line in evaluated]
    pooled = to_numbers(line["test"][metric] for line in evaluated)
    mean, std, worst = (
        to_numbers(line["clients"][metric][key] for line in evaluated) for key in ("mean", "std", "worst10")
    )
    low, high = (0.0, 1.0) if metric == "accuracy" else (0.0, math.inf)
    marker = "o" if len(rounds) <= 12 else None
    band = (np.clip(mean - std, low, high), np.clip(mean + std, low, high))
    axis.fill_between(rounds, *band, color=CLIENTS_COLOR, alpha=0.25, linewidth=0, label="clients, mean ± std")
    axis.plot(rounds, mean, color=CLIENTS_COLOR, linewidth=1.2, linestyle=(0, (4, 2)), label="clients, mean")
    axis.plot(
        rounds, worst, color=WORST_COLOR, linewidth=1.4, marker=marker, markersize=3, label="worst 10 % of clients"
    )
    axis.plot(
        rounds, pooled, color=POOLED_COLOR, linewidth=1.9, marker=marker, markersize=3.5, label="all test examples"
    )
    axis.set(title=metric_name(metric), xlabel=f"{unit} on the clock" if unit else "round")
    axis.margins(x=0.02)
    axis.grid(axis="y")
    axis.locator_params(axis="x", integer=not unit)
    format_as_percent(axis.yaxis, metric)


def traffic(history: History, metric: str) -> Figure:
    """Draw a metric over the total number of bytes that clients have sent."""
    sent, points = 0, []
    for line in history:
        sent += line["bytes_up"]
        if line["test"] and line["test"].get(metric) is not None:
            points.append((sent, line["test"][metric]))
    unit, name = next((2**power, name) for power, name in BYTE_UNITS if points[-1][0] >= 2**power)
    figure = new_figure(WIDTH_INCHES * 0.62, 2.7)
    axis = figure.subplots()
    axis.plot(
        [x / unit for x, _ in points],
        [y for _, y in points],
        color=POOLED_COLOR,
        linewidth=1.8,
        marker="o",
        markersize=2.5,
    )
    axis.set(title=f"{metric_name(metric)} against bytes", xlabel=f"sent by clients so far, {name}")
    axis.set_ylabel(metric_name(metric))
    axis.set_xlim(left=0)
    axis.grid(axis="y")
    format_as_percent(axis.yaxis, metric)
    return figure


def fairness(clients: Sequence[Mapping[str, Any]], main_metric: str, lower_is_better: Sequence[str] = ()) -> Figure:
    """Draw the main metric of each client, worst first, and the mean over clients.

    Clients without a defined value are omitted. The worst tenth has another color.

    Args:
        clients: rows of ``clients.csv``; at least one has a value.
        main_metric: name of the metric.
        lower_is_better: metrics of the user whose low values are good.
    """
    defined = [row for row in clients if row[main_metric] is not None]
    ordered = sorted(
        defined, key=lambda row: row[main_metric], reverse=not higher_is_better(main_metric, lower_is_better)
    )
    values = to_numbers(row[main_metric] for row in ordered)
    num_worst = max(1, math.ceil(0.1 * len(values)))
    colors = [WORST_COLOR if k < num_worst else POOLED_COLOR for k in range(len(values))]
    named = len(ordered) <= MAX_NAMED_BARS
    figure = new_figure(WIDTH_INCHES, 1.3 + 0.24 * len(ordered) if named else 3.3)
    axis = figure.subplots()
    (_named_bars if named else _thin_bars)(axis, ordered, values, colors, main_metric)
    axis.set_title(f"{metric_name(main_metric)} by client")
    return figure


def _named_bars(
    axis: Axes, ordered: Sequence[Mapping[str, Any]], values: np.ndarray, colors: list[str], main: str
) -> None:
    places = np.arange(len(ordered))
    axis.barh(places, values, color=colors, height=0.68)
    for place, value in zip(places, values, strict=True):
        axis.annotate(
            format_metric(main, value), (1, place), xycoords=("axes fraction", "data"),
            xytext=(46, 0), textcoords="offset points", ha="right", va="center", color=TEXT_COLOR,
        )  # fmt: skip
    axis.set_yticks(places, [f"{short_name(row['name'])}  (n = {row['num_examples']})" for row in ordered])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(ordered) - 0.5, -0.5)
    axis.axvline(values.mean(), color=TEXT_COLOR, linewidth=1, linestyle=(0, (4, 2)))
    axis.annotate(
        f"mean {format_metric(main, values.mean())}", (values.mean(), 1), xycoords=("data", "axes fraction"),
        xytext=(0, 3), textcoords="offset points", ha="center", color=TEXT_COLOR,
    )  # fmt: skip
    axis.set_xlim(min(0, values.min()), 1.0 if main == "accuracy" else None)
    axis.set_xlabel(metric_name(main))
    format_as_percent(axis.xaxis, main)


def _thin_bars(
    axis: Axes, ordered: Sequence[Mapping[str, Any]], values: np.ndarray, colors: list[str], main: str
) -> None:
    axis.bar(np.arange(1, len(values) + 1), values, color=colors, width=1.0, linewidth=0)
    axis.axhline(values.mean(), color=TEXT_COLOR, linewidth=1, linestyle=(0, (4, 2)))
    below = 0 if values[0] <= values[-1] else 1  # side at which bars end below the line, so that the label is on white
    axis.annotate(
        f"mean {format_metric(main, values.mean())}", (below, values.mean()), xycoords=("axes fraction", "data"),
        xytext=(6 - 12 * below, 4), textcoords="offset points", ha="right" if below else "left", color=TEXT_COLOR,
    )  # fmt: skip
    axis.set(xlabel="client, worst first", ylabel=metric_name(main), xlim=(0.5, len(values) + 0.5))
    axis.set_ylim(min(0, values.min()), 1.0 if main == "accuracy" else None)
    format_as_percent(axis.yaxis, main)


def partition(summary: Mapping[str, Any]) -> Figure:
    """Draw the number of training examples per client and class (or range of the target), and per client.

    Args:
        summary: return value of `fedlearn.callbacks.run_files.partition_summary`.
    """
    rows, labelled = summary["clients"], summary["kind"] == "labels"
    counts = np.array([row["counts"] for row in rows])
    num_columns = counts.shape[1]
    height = 1.3 + max(1.2, min(7.0, 0.27 * len(rows)))
    figure = new_figure(WIDTH_INCHES, height)
    axis, totals_axis = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    image = axis.imshow(counts, cmap="Blues", vmin=0, vmax=max(1, counts.max(initial=0)), aspect="auto")
    axis.set(title="Training examples by client", xlabel="class" if labelled else "target", ylabel="client")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    sparse_ticks(axis.xaxis, column_names(summary), 16, shift=0 if labelled else -0.5)
    sparse_ticks(axis.yaxis, [short_name(row["name"]) for row in rows], MAX_NAMED_BARS)
    axis.set_xticks(np.arange(-0.5, num_columns), minor=True)
    axis.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    if len(rows) <= MAX_NAMED_BARS:
        axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axis, pad=0.015, fraction=0.05, aspect=24)
    bar.ax.locator_params(axis="y", integer=True)
    bar.outline.set_visible(False)
    if len(rows) <= MAX_ANNOTATED_CELLS[0] and num_columns <= MAX_ANNOTATED_CELLS[1]:
        annotate_cells(axis, counts)
    _sizes(totals_axis, [row["num_examples"] for row in rows])
    return figure


def column_names(summary: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes, or the edges of the ranges, of a partition."""
    columns = summary["columns"]
    return [short_name(each, 12) if isinstance(each, str) else f"{each:.4g}" for each in columns]


def _sizes(axis: Axes, sizes: Sequence[int]) -> None:
    axis.barh(np.arange(len(sizes)), sizes, color=CLIENTS_COLOR, height=0.68 if len(sizes) <= MAX_NAMED_BARS else 1.0)
    axis.set(title="Total", xlabel="examples", xlim=(0, 1.05 * max(1, *sizes)))
    axis.tick_params(axis="y", which="both", length=0, labelleft=False)
    axis.spines["left"].set_visible(False)
    axis.locator_params(axis="x", nbins=3, integer=True)
