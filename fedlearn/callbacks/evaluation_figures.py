"""Draw the judgement of a final model: confusion matrix, curves, calibration and residuals.

The functions draw entries of ``evaluation.json``, see `fedlearn.callbacks.evaluation_file`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.callbacks.figure_style import (
    CLIENTS_COLOR,
    PALETTE,
    POOLED_COLOR,
    TEXT_COLOR,
    WIDTH_INCHES,
    annotate_cells,
    new_figure,
    short_name,
    sparse_ticks,
    text_width,
    to_numbers,
)

if TYPE_CHECKING:
    from fedlearn.callbacks.figure_style import Axes, Figure

MAX_TICKS = 12
DASHED = (0, (4, 2))


def confusion(confusion_CC: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw confusion counts, with one row per true class and one column per predicted class.

    Args:
        confusion_CC: counts, targets x predictions.
        classes: names of the classes.
    """
    num_classes, names = len(confusion_CC), [short_name(name, 16) for name in classes]
    widest = max(map(text_width, names))
    side = max(1.6, min(4.6, 0.42 * num_classes))
    figure = new_figure(min(WIDTH_INCHES, side + 0.9 + 0.08 * widest), side + 1.0 + 0.05 * widest * (widest > 4))
    axis = figure.subplots()
    axis.imshow(confusion_CC, cmap="Blues", vmin=0, vmax=max(1, confusion_CC.max(initial=0)))
    axis.set(title="Held-out examples", xlabel="predicted class", ylabel="true class")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    for ticks in (axis.xaxis, axis.yaxis):
        sparse_ticks(ticks, names, MAX_TICKS)
    if widest > 4:
        axis.tick_params(axis="x", rotation=30)
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right")
    if num_classes <= MAX_TICKS:
        annotate_cells(axis, confusion_CC)
    return figure


def curves(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the ROC curve, and precision over recall, of each class.

    Args:
        entries: entry ``curves``.
    """
    figure = new_figure(WIDTH_INCHES, 3.7 + 0.18 * ((len(entries) - 1) // 3))
    roc, precision = figure.subplots(1, 2)
    for number, entry in enumerate(entries):
        color = PALETTE[number % len(PALETTE)] if len(entries) > 1 else POOLED_COLOR
        line = {"color": color, "linewidth": 1.6, "linestyle": "-" if number < len(PALETTE) else DASHED}
        name = short_name(entry["class"], 16)
        label = f"{name}: AUC {entry['auc']:.3f}, AP {entry['average_precision']:.3f}"
        roc.plot(entry["roc"]["x"], entry["roc"]["y"], **line)
        points = entry["precision_recall"]
        precision.plot(points["x"], points["y"], drawstyle="steps-pre", label=label, **line)
    roc.plot([0, 1], [0, 1], color=TEXT_COLOR, linewidth=1, linestyle=DASHED)
    chance = "random order"
    if len(entries) == 1:
        precision.axhline(entries[0]["prevalence"], color=TEXT_COLOR, linewidth=1, linestyle=DASHED, label=chance)
    _unit_square(roc, "ROC", "false positive rate", "true positive rate")
    _unit_square(precision, "Precision and recall", "recall", "precision")
    figure.legend(loc="outside lower center", ncols=min(3, len(entries) + 1), columnspacing=1.6, handlelength=1.6)
    return figure


def calibration(entry: Mapping[str, Any]) -> Figure:
    """Draw the reliability curve, and the number of examples in each bin.

    Args:
        entry: entry ``calibration``.
    """
    figure = new_figure(WIDTH_INCHES, 3.4)
    curve, counts = figure.subplots(1, 2)
    curve.plot([0, 1], [0, 1], color=TEXT_COLOR, linewidth=1, linestyle=DASHED)
    points = zip(entry["predicted"], entry["observed"], strict=True)
    predicted, observed = to_numbers(x for x, _ in points), to_numbers(entry["observed"])
    curve.plot(predicted[~np.isnan(predicted)], observed[~np.isnan(observed)], color=POOLED_COLOR, marker="o",
               markersize=4, linewidth=1.6)  # fmt: skip
    _unit_square(curve, "Calibration", "predicted probability", "observed share")
    edges = np.array(entry["edges"])
    counts.bar(edges[:-1], entry["num_examples"], width=np.diff(edges), align="edge", color=CLIENTS_COLOR,
               edgecolor="white")  # fmt: skip
    counts.set(title="Held-out examples", xlabel="predicted probability", ylabel="examples", xlim=(0, 1))
    counts.locator_params(axis="y", integer=True)
    return figure


def residuals(entry: Mapping[str, Any], unit: str) -> Figure:
    """Draw the counts of examples by target and prediction, and the histogram of the residuals.

    Args:
        entry: entry ``residuals``.
        unit: unit of the target; may be empty.
    """
    suffix = f", {short_name(unit, 12)}" if unit else ""
    figure = new_figure(WIDTH_INCHES, 3.4)
    pairs, histogram = figure.subplots(1, 2)
    edges = np.array(entry["pair_edges"])
    counts = np.ma.masked_equal(np.array(entry["pair_counts"]).T, 0)
    image = pairs.pcolormesh(edges, edges, counts, cmap="Blues", vmin=0)
    pairs.plot(edges[[0, -1]], edges[[0, -1]], color=TEXT_COLOR, linewidth=1, linestyle=DASHED)
    pairs.set(title="Prediction against target", xlabel=f"target{suffix}", ylabel=f"prediction{suffix}")
    bar = figure.colorbar(image, ax=pairs, pad=0.02, aspect=24, label="examples")
    bar.outline.set_visible(False)
    bar.ax.locator_params(axis="y", integer=True)
    edges = np.array(entry["edges"])
    histogram.bar(edges[:-1], entry["counts"], width=np.diff(edges), align="edge", color=CLIENTS_COLOR,
                  edgecolor="white")  # fmt: skip
    histogram.axvline(0, color=TEXT_COLOR, linewidth=1, linestyle=DASHED)
    histogram.set(title="Residuals", xlabel=f"prediction minus target{suffix}", ylabel="examples")
    histogram.locator_params(axis="y", integer=True)
    return figure


def _unit_square(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set_aspect("equal")
    axis.grid()
