"""Draw the figures of a report, and describe them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.callbacks import evaluation_figures, figures
from fedlearn.callbacks.figure_style import DOTS_PER_INCH, metric_name, style
from fedlearn.callbacks.fonts import choose_fonts, missing_glyphs_warning
from fedlearn.callbacks.judgement import last_confusion
from fedlearn.callbacks.report_tables import has_clock
from fedlearn.callbacks.run_results import RunResults

log = logging.getLogger(__name__)


def draw_figures(run: RunResults, folder: Path) -> dict[str, Path]:
    """Draw the figures that have data.

    Returns:
        Name of the figure -> PNG file.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    text = figure_text(run)
    with style(text), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the report names these characters
        drawn = {**_run_figures(run), **_evaluation_figures(run)}
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=DOTS_PER_INCH, facecolor="white")
    return {name: folder / f"{name}.png" for name in drawn}


def figure_text(run: RunResults) -> str:
    """Return all names that the figures show."""
    names = [str(row["name"]) for row in [*run.clients, *run.partition.get("clients", [])]]
    columns = [each for each in run.partition.get("columns", []) if isinstance(each, str)]
    return "".join([*names, *columns, *run.classes, run.target.get("unit", ""), run.target.get("name", "")])


def font_warnings(run: RunResults) -> list[str]:
    """Return a sentence if no font of this machine has the characters of the names."""
    _, missing = choose_fonts(figure_text(run))
    if missing:
        log.warning("%s", missing_glyphs_warning(missing))
    return [missing_glyphs_warning(missing)] if missing else []


def _run_figures(run: RunResults) -> dict[str, Any]:
    drawn, main = {}, run.main_metric
    if any(line["test"] for line in run.history):
        drawn["convergence"] = figures.convergence(run.history, main, run.baselines)
    if any(line["test"] and line["test"].get(main) is not None for line in run.history):
        drawn["traffic"] = figures.traffic(run.history, main)
    if has_clock(run) and any(line["test"] for line in run.history):
        drawn["time"] = figures.time_to_accuracy(run.history, main, run.baselines)
    if any(row.get(main) is not None for row in run.clients):
        trained = [row for row in run.clients if not row.get("held_out")]
        drawn["fairness"] = figures.fairness(trained, main, run.lower_is_better)
    if run.partition.get("clients"):
        drawn["partition"] = figures.partition(run.partition)
    return drawn


def _evaluation_figures(run: RunResults) -> dict[str, Any]:
    evaluation, drawn = run.evaluation, {}
    confusion_CC = np.array(evaluation["confusion"]) if evaluation.get("confusion") else last_confusion(run.history)
    if confusion_CC is not None:
        numbers = list(map(str, range(len(confusion_CC))))
        names = run.classes if len(run.classes) == len(confusion_CC) else numbers
        drawn["confusion"] = evaluation_figures.confusion(confusion_CC, names)
    if evaluation.get("curves"):
        drawn["curves"] = evaluation_figures.curves(evaluation["curves"])
    if evaluation.get("calibration"):
        drawn["calibration"] = evaluation_figures.calibration(evaluation["calibration"])
    if evaluation.get("residuals"):
        drawn["residuals"] = evaluation_figures.residuals(evaluation["residuals"], run.target.get("unit", ""))
    return drawn


def captions(run: RunResults) -> dict[str, str]:
    """Return a caption for each figure."""
    main, inline = metric_name(run.main_metric), metric_name(run.main_metric, inline=True)
    undefined = sum(row.get(run.main_metric) is None for row in run.clients)
    omitted = f" {undefined} clients without a defined value are omitted." if undefined else ""
    shown, population = len(run.partition.get("clients", [])), run.partition.get("num_clients", 0)
    some = f" The first {shown} of {population:,} clients are shown." if shown < population else ""
    column = "class" if run.partition.get("kind") == "labels" else "range of the target"
    return {
        "convergence": f"Loss and {inline} of the global model on held-out examples after each evaluated round. The "
        "solid blue line is on the pooled examples. The other lines and the band count each client once: mean, one "
        "standard deviation around it, and the mean over the worst tenth.",
        "traffic": f"{main} of the global model on held-out examples over the total number of bytes that clients have "
        "sent, after compression.",
        "time": f"Loss and {inline} over the time since the start of the run, without evaluation. In a simulation, the "
        "time is on the virtual clock of the system model; in a deployment, it is real time.",
        "fairness": f"{main} of the last evaluated model on the held-out examples of each client, worst first. The "
        f"worst tenth is orange. The dashed line is the mean over clients.{omitted}",
        "partition": f"Number of training examples by client and {column}, and by client. Darker cells have more "
        f"examples.{some}",
        **_evaluation_captions(run.evaluation),
    }


def _evaluation_captions(evaluation: Mapping[str, Any]) -> dict[str, str]:
    event = evaluation.get("calibration", {}).get("event", "")
    return {
        "confusion": "Number of pooled held-out examples by true and predicted class, at the last evaluation.",
        "curves": "Each class against the others, over all thresholds. AUC is the area under the ROC curve, and AP the "
        "average precision. The dashed lines are a random order of the examples.",
        "calibration": f"Predicted probability and observed share of the event: {event}. On the dashed line, both "
        "are equal. A bar counts the examples of a bin.",
        "residuals": "Number of held-out examples by target and prediction, and the histogram of the residuals. The "
        "dashed lines are a perfect prediction. Values outside the axes count for the outer bins.",
    }
