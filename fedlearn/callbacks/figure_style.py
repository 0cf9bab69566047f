"""Style of all figures: colors, one font size, fonts for all scripts, and short names.

The functions use neither pyplot nor process-wide settings.
"""

from __future__ import annotations

import math
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.callbacks.fonts import choose_fonts
from fedlearn.callbacks.formatting import PERCENT_METRICS
from fedlearn.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Palette of Okabe and Ito. Its colors differ for people with common kinds of color blindness, and in grey.
POOLED_COLOR, WORST_COLOR, CLIENTS_COLOR, TEXT_COLOR = "#0072B2", "#D55E00", "#56B4E9", "#333333"
CENTRAL_COLOR, LOCAL_COLOR = "#009E73", "#CC79A7"
PALETTE = (POOLED_COLOR, WORST_COLOR, CENTRAL_COLOR, LOCAL_COLOR, "#E69F00", CLIENTS_COLOR, "#000000")
WIDTH_INCHES = 7.6  # width of a page
DOTS_PER_INCH = 180
FONT_SIZE = 9  # points, of all text in all figures
MAX_NAME_WIDTH = 28  # columns of a terminal; a Chinese character takes two
METRIC_NAMES = {
    "auc": "AUC",
    "auprc": "AUPRC",
    "c_index": "C-index",
    "ece": "ECE",
    "f1": "F1",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "brier": "Brier score",
    "attack_success": "Attack success",
    "balanced_accuracy": "Balanced accuracy",
}
STYLE: Mapping[Any, Any] = {
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": FONT_SIZE,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "legend.frameon": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
}


def style(text: str = "") -> AbstractContextManager[None]:
    """Return a context in which new figures have the style of reports.

    Args:
        text: names of clients, classes and columns in the figures, for which fonts are chosen.
    """
    try:
        import matplotlib
    except ImportError as missing:
        raise MissingExtra("report.html", "report") from missing
    return matplotlib.rc_context({**STYLE, "font.family": choose_fonts(text)[0]})


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def share_of_page(path: Path) -> float:
    """Return the width of a PNG file as a share of the page, so that text has one size in all figures."""
    width = struct.unpack(">I", path.read_bytes()[16:20])[0]
    return float(width / (WIDTH_INCHES * DOTS_PER_INCH))


def metric_name(metric: str, *, inline: bool = False) -> str:
    """Return the usual name of a metric. ``inline`` is True for use inside a sentence.

    >>> metric_name("accuracy"), metric_name("accuracy", inline=True), metric_name("auc", inline=True)
    ('Accuracy', 'accuracy', 'AUC')
    """
    if inline and metric in ("brier", "balanced_accuracy", "attack_success"):
        return METRIC_NAMES[metric][0].lower() + METRIC_NAMES[metric][1:] if metric != "brier" else METRIC_NAMES[metric]
    name = metric.replace("_", " ")
    return METRIC_NAMES.get(metric, name if inline else name.capitalize())


def short_name(name: str, max_width: int = MAX_NAME_WIDTH) -> str:
    r"""Return a name for a figure: at most ``max_width`` columns wide, without control characters and formulas.

    >>> short_name("north", 4), short_name("上海第一医院", 7), short_name("a$b")
    ('nor…', '上海第…', 'a\\$b')
    """
    text = "".join(each if each.isprintable() else " " for each in name)
    if text_width(text) > max_width:
        width, kept = 0, ""
        for each in text:
            width += _columns(each)
            if width > max_width - 1:
                break
            kept += each
        text = f"{kept}…"
    return text.replace("$", r"\$")  # matplotlib would read a formula between two dollars


def text_width(text: str) -> int:
    """Return the width of a text in columns of a terminal, in which a Chinese character takes two."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def annotate_cells(axis: Axes, counts: np.ndarray) -> None:
    """Write the number of each cell of a heat map, in white on dark cells."""
    dark = 0.55 * counts.max(initial=1)
    for (row, column), count in np.ndenumerate(counts):
        axis.text(column, row, f"{count}", ha="center", va="center", color="white" if count > dark else TEXT_COLOR)


def sparse_ticks(axis: Any, names: Sequence[str], max_ticks: int, *, shift: float = 0.0) -> None:
    """Set at most ``max_ticks`` ticks with names."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, len(names)) if len(names) <= step * max_ticks)
    axis.set_ticks([place + shift for place in range(0, len(names), step)], names[::step])


def format_as_percent(axis: Any, metric: str) -> None:
    """Format the ticks of an axis in per cent, if the metric is a share of examples."""
    if metric in PERCENT_METRICS:
        from matplotlib.ticker import PercentFormatter

        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def show_range(axes: Axes, low: float, high: float, *, is_log: bool) -> None:
    """Show all values from ``low`` to ``high`` on the x axis, with plain numbers at the ticks."""
    if is_log:
        from matplotlib.ticker import NullFormatter

        axes.set_xscale("log")
        axes.set_xlim(low / 1.2, high * 1.2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        return
    margin = 0.05 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.locator_params(axis="x", nbins=5)


def to_numbers(values: Any) -> np.ndarray:
    """Return values as float64, with NaN in place of None."""
    return np.array([math.nan if value is None else value for value in values], np.float64)
