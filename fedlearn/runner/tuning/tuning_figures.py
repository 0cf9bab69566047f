"""Draw the figures of a tuning: the metric against each searched setting, and the importance of the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlearn.callbacks.figure_style import (
    CENTRAL_COLOR,
    POOLED_COLOR,
    WIDTH_INCHES,
    WORST_COLOR,
    format_as_percent,
    metric_name,
    new_figure,
    short_name,
    show_range,
)
from fedlearn.runner.tuning.search_space import Range

if TYPE_CHECKING:
    from fedlearn.callbacks.figure_style import Figure

COLUMNS = 3
PANEL_HEIGHT = 2.4  # inches


def slices(trials: Sequence[Any], ranges: Mapping[str, Range], metric: str, *, default: float) -> Figure:
    """Draw one panel for each setting: the metric of each complete trial against the value of the setting.

    Args:
        trials: complete trials of Optuna, at least one.
        ranges: setting -> its values.
        metric: name of the metric.
        default: value of the run with default values.
    """
    rows = -(-len(ranges) // COLUMNS)
    figure = new_figure(WIDTH_INCHES, PANEL_HEIGHT * rows + 0.4)
    columns = min(COLUMNS, len(ranges))
    for place, (name, values) in enumerate(ranges.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        shown = [trial for trial in trials if name in trial.params]
        if values.choices:
            positions: list[float] = [values.choices.index(trial.params[name]) for trial in shown]
            axes.set_xticks(range(len(values.choices)), [short_name(text) for text in values.choices])
            axes.set_xlim(-0.5, len(values.choices) - 0.5)
        else:
            positions = [trial.params[name] for trial in shown]
            assert values.low is not None
            assert values.high is not None
            show_range(axes, values.low, values.high, is_log=values.kind == "loguniform")
        numbers = [trial.number for trial in shown]
        points = axes.scatter(
            positions, [trial.value for trial in shown], c=numbers, cmap="Blues", vmin=-len(numbers) / 2
        )
        points.set_edgecolor(POOLED_COLOR)
        axes.set_xlabel(short_name(name))
        axes.axhline(default, color=CENTRAL_COLOR, linestyle="--", linewidth=1)
        format_as_percent(axes.yaxis, metric)
        if place % COLUMNS == 0:
            axes.set_ylabel(metric_name(metric))
    figure.suptitle(
        "Trials: later trials are darker, the dashed line is the run with default values",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=9,
    )
    return figure


def importance(shares: Mapping[str, float]) -> Figure:
    """Draw the share of each setting in the variance of the metric as bars."""
    figure = new_figure(WIDTH_INCHES, 0.9 + 0.35 * len(shares))
    axes = figure.add_subplot()
    names = list(shares)[::-1]
    axes.barh([short_name(name) for name in names], [100 * shares[name] for name in names], color=WORST_COLOR)
    axes.set_xlabel("share of the variance of the metric, %")
    axes.set_title("Importance of the settings")
    return figure
