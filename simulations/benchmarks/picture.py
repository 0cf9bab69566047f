"""Draw the figure of a comparison. A dot is a median, a stroke is a repeat, and faster is to the left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from fedlearn.callbacks.figure_style import CLIENTS_COLOR, POOLED_COLOR, TEXT_COLOR, WIDTH_INCHES, style
from simulations.benchmarks.measure import Run
from simulations.benchmarks.tables import groups


def draw(path: Path, runs: Sequence[Run], *, title: str) -> None:
    """Save a dot plot of the seconds per round, on a logarithmic axis."""
    good = groups([run for run in runs if not run.error])
    if not good:
        return
    with style():
        figure = Figure(figsize=(WIDTH_INCHES, 1.2 + 0.34 * len(good)), layout="constrained")
        axis = figure.subplots()
        for row, ((_, system), repeats) in enumerate(good.items()):
            seconds = [run.seconds_per_round for run in repeats]
            axis.plot(
                median(seconds), row, "o", color=POOLED_COLOR if system == "ours" else CLIENTS_COLOR, markersize=10
            )
            axis.plot(seconds, [row] * len(seconds), "|", color=TEXT_COLOR, markersize=8)
            axis.annotate(f"   {median(seconds):.3g} s", (max(seconds), row), va="center")
        axis.set_yticks(range(len(good)), [f"{system} ({framework})" for framework, system in good])
        axis.set_ylim(len(good) - 0.5, -0.5)
        axis.grid(axis="x")
        axis.set_xscale("log")
        axis.set_xlabel("seconds per round: median (dot) and repeats (strokes)")
        axis.set_title(title)
        axis.margins(x=0.15)
        figure.savefig(path, dpi=150)
