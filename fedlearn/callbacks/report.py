"""Write the report of a run from the files of its run folder: ``report.html``, one file that is readable offline.

``python -m simulations.report RUN`` writes it again.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.callbacks import figures
from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.formatting import NO_GUARANTEE, format_metric, human_bytes, human_seconds
from fedlearn.callbacks.judgement import balanced_accuracy, last_confusion, majority_share
from fedlearn.callbacks.run_history import METRICS_FILE, best_metrics, final_metrics, read_history, totals
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.metrics import higher_is_better
from fedlearn.errors import DataError, MissingExtra, require

DOTS_PER_INCH = 180
TARGET_FRACTIONS = (0.5, 0.9, 0.95, 1.0)  # share of the improvement from the first evaluation to the best value

log = logging.getLogger(__name__)


class Report(Callback):
    """Write ``report.html`` and its figures into the run folder at the end of a run. A stopped run has no report.

    An error of the report is logged and is not a failure of the callback, because the run folder has all data.

    Args:
        enabled: False writes no report; default True.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        require(isinstance(enabled, bool), "enabled", enabled, "true or false", "enabled=true")
        self._enabled = enabled
        self._folder = Path()

    def on_start(self, run: RunInfo) -> None:
        """Remember the run folder for the report."""
        self._folder = run.folder

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the report, unless the run was stopped."""
        if not self._enabled or summary["status"] == "stopped":
            return
        try:
            write_report(self._folder)
        except Exception as error:
            log.exception("the report cannot be written")
            reason = error if isinstance(error, MissingExtra) else f"see {self._folder}/run.log"
            sys.stderr.write(f" no report: {reason}\n")


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
    """

    history: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    clients: Sequence[Mapping[str, Any]]
    partition: Mapping[str, Any]
    config: str

    @property
    def main_metric(self) -> str:
        """Name of the main metric of the run."""
        final = self.summary["final"]
        return self.summary.get("metric") or next((m for m in ("rmse", "hr@10") if m in final), "accuracy")


def read_run(folder: Path) -> RunResults:
    """Return the contents of a run folder.

    Raises:
        DataError: the folder is not a run folder.
    """
    if not (folder / METRICS_FILE).is_file():
        raise DataError(
            f"{folder} is not a run folder: it has no {METRICS_FILE}\n  try       the folder that a run prints as saved"
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
    )


def write_report(folder: Path) -> Path:
    """Draw ``figures/*.png`` and write ``report.html`` from the files of a run folder.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: the folder is not a run folder.
        MissingExtra: matplotlib or Jinja2 is not installed.
    """
    folder = Path(folder)
    run = read_run(folder)
    images = {name: data_uri(path) for name, path in draw_figures(run, folder / "figures").items()}
    page = load_template("report.html").render(
        title=_title(run),
        run=run,
        facts=headline_rows(run),
        results=metric_rows(run),
        judgement=judgement_rows(run),
        failures=failure_rows(run),
        baselines=baseline_metrics(run),
        privacy=privacy_rows(run),
        reached=time_to_target_rows(run),
        main=figures.metric_name(run.main_metric),
        metric=figures.metric_name(run.main_metric, inline=True),
        captions=captions(run),
        images=images,
    )
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def draw_figures(run: RunResults, folder: Path) -> dict[str, Path]:
    """Draw the figures that have data.

    Returns:
        Name of the figure -> PNG file.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with figures.style():
        drawn = {}
        if any(line["test"] for line in run.history):
            drawn["convergence"] = figures.convergence(run.history, run.main_metric, baseline_metrics(run))
        if any(line["test"] and line["test"].get(run.main_metric) is not None for line in run.history):
            drawn["traffic"] = figures.traffic(run.history, run.main_metric)
        if has_clock(run) and any(line["test"] for line in run.history):
            drawn["time"] = figures.time_to_accuracy(run.history, run.main_metric, baseline_metrics(run))
        if any(row.get(run.main_metric) is not None for row in run.clients):
            drawn["fairness"] = figures.fairness(run.clients, run.main_metric)
        confusion_CC = last_confusion(run.history)
        if confusion_CC is not None:
            drawn["confusion"] = figures.confusion(confusion_CC)
        if run.partition.get("clients"):
            drawn["partition"] = figures.partition(run.partition)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=DOTS_PER_INCH, facecolor="white")
    return {name: folder / f"{name}.png" for name in drawn}


def headline_rows(run: RunResults) -> list[tuple[str, str]]:
    """Return the main numbers of a run as pairs (label, value)."""
    summary = run.summary
    last = summary["final"].get(run.main_metric)
    return [
        (
            figures.metric_name(run.main_metric),
            format_metric(run.main_metric, last) if run.main_metric in summary["final"] else "–",
        ),
        ("Rounds", f"{summary['rounds']:,}"),
        *_best_round(summary),
        ("Time", human_seconds(summary["seconds"])),
        *([("On the clock", human_seconds(summary["clock"]))] if "clock" in summary else []),
        ("Client updates", f"{summary['client_updates']:,}"),
        ("Sent by clients", human_bytes(summary["bytes_up"])),
        ("Sent to clients", human_bytes(summary["bytes_down"])),
    ]


def judgement_rows(run: RunResults) -> list[tuple[str, str]]:
    """Return rows that put the accuracy of a classification into perspective; empty for other tasks."""
    confusion_CC = last_confusion(run.history)
    if confusion_CC is None:
        return []
    return [
        ("Balanced accuracy", f"{100 * balanced_accuracy(confusion_CC):.1f} %, the mean recall over classes"),
        ("Largest class", f"{100 * majority_share(confusion_CC):.1f} % of the held-out examples"),
    ]


def _best_round(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    best = summary.get("best_checkpoint")
    if not best:
        return []
    value = format_metric(best["metric"], best["value"])
    return [("Best round", f"{best['round']:,} ({figures.metric_name(best['metric'], inline=True)} {value})")]


def metric_rows(run: RunResults) -> list[dict[str, str]]:
    """Return the rows of the result table: last and best value of each metric, baselines, and values over clients.

    Rows of personal models follow, if the strategy has personal models.
    """
    last = next((line for line in reversed(run.history) if line["test"]), None)
    rows = []
    for metric, value in (last["test"] if last else {}).items():
        over_clients, best = last["clients"].get(metric, {}) if last else {}, run.summary["best"].get(metric)
        best_text = f"{format_metric(metric, best['value'])} (round {best['round']})" if best else "nan"
        pooled = {"metric": figures.metric_name(metric), "final": format_metric(metric, value), "best": best_text}
        baselines = {
            name: format_metric(metric, baseline["test"].get(metric))
            for name, baseline in baseline_metrics(run).items()
        }
        rows.append({**pooled, **baselines, **_client_cells(metric, over_clients)})
    no_baselines = dict.fromkeys(baseline_metrics(run), "–")
    for metric, personal in (last.get("personal", {}) if last else {}).items():
        name, value = f"{figures.metric_name(metric)}, personal models", format_metric(metric, personal["pooled"])
        pooled = {"metric": name, "final": value, "best": "–"}
        rows.append({**pooled, **no_baselines, **_client_cells(metric, personal)})
    return rows


def _client_cells(metric: str, statistics: Mapping[str, Any]) -> dict[str, str]:
    return {key: format_metric(metric, statistics.get(key)) for key in ("mean", "std", "worst10")}


def has_clock(run: RunResults) -> bool:
    """Return whether all rounds have a clock: the virtual clock of a system model, or real time in a deployment."""
    return bool(run.history) and all("clock" in line for line in run.history)


def time_to_target_rows(run: RunResults) -> list[dict[str, str]]:
    """Return the time at which the main metric reached each of `TARGET_FRACTIONS`.

    A fraction is a share of the improvement from the first evaluation to the best value. Without a clock, or with less
    than two evaluations, there are no rows.

    Returns:
        Rows with ``share``, ``value``, ``clock`` and ``round``.
    """
    evaluated = [line for line in run.history if line["test"] and line["test"].get(run.main_metric) is not None]
    if not (has_clock(run) and len(evaluated) > 1):
        return []
    first, best = evaluated[0]["test"][run.main_metric], run.summary["best"][run.main_metric]["value"]
    sign = 1 if higher_is_better(run.main_metric) else -1
    rows = []
    for share in TARGET_FRACTIONS:
        target = first + share * (best - first)
        line = next(line for line in evaluated if sign * (line["test"][run.main_metric] - target) >= -1e-12)
        rows.append(
            {
                "share": f"{100 * share:g} %",
                "value": format_metric(run.main_metric, target),
                "clock": human_seconds(line["clock"]),
                "round": f"{line['round']:,}",
            }
        )
    return rows


def baseline_metrics(run: RunResults) -> Mapping[str, Any]:
    """Return name -> metrics of each baseline that was trained, see `fedlearn.runner.baselines.train_baselines`."""
    return run.summary.get("baselines", {})


def privacy_rows(run: RunResults) -> list[tuple[str, str]]:
    """Return the rows on privacy: mechanism, guarantee, privacy loss and limitations; empty without a guarantee."""
    privacy = run.summary.get("privacy")
    if not privacy:
        return []
    limits = [("Withheld", privacy["withheld"]), ("Not covered", "; ".join(privacy["not_covered"]))]
    clip = "" if privacy["clip_norm"] is None else f", clip {privacy['clip_norm']:g}"
    if privacy["delta"] is None:
        mechanism = f"{privacy['kind']}{clip}"
        return [("Mechanism", mechanism), ("Protects", privacy["adjacency"]), ("Epsilon", NO_GUARANTEE), *limits]
    by_rdp = "–" if privacy["epsilon_rdp"] is None else f"{privacy['epsilon_rdp']:.6g}"
    noise = []
    if privacy["noise_multiplier"] is not None:
        noise = [("Noise", f"multiplier {privacy['noise_multiplier']:.6g}, {privacy['noise']}")]
    bound = "no bound" if privacy["epsilon"] is None else f"{privacy['epsilon']:.6g}"
    return [
        ("Mechanism", f"{privacy['kind']}{clip}" + f" ({privacy['clip']})" * bool(clip)),
        ("Protects", f"one {privacy['unit']}: {privacy['adjacency']}"),
        ("Epsilon", f"{bound} at delta {privacy['delta']:g}"),
        ("By RDP alone", by_rdp),
        ("Budget", "none" if privacy["budget"] is None else f"{privacy['budget']:g}"),
        ("Sampling", privacy["sampling"]),
        *noise,
        *limits,
        *(("Warning", text) for text in privacy["warnings"]),
    ]


def failure_rows(run: RunResults) -> list[dict[str, Any]]:
    """Return the failures by client and stage, the most frequent first.

    Returns:
        Rows with ``client``, ``name``, ``stage``, ``count``, and the round (``first``) and ``reason`` of the first
        failure.
    """
    names = {row["client"]: row["name"] for row in [*run.partition.get("clients", []), *run.clients]}
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for line in run.history:
        for failure in line["failures"]:
            client = failure["client"]
            first = failure | {"name": names.get(client, str(client)), "first": line["round"], "count": 0}
            rows.setdefault((client, failure["stage"]), first)["count"] += 1
    return sorted(rows.values(), key=lambda row: -row["count"])


def captions(run: RunResults) -> dict[str, str]:
    """Return a caption for each figure."""
    main, inline = figures.metric_name(run.main_metric), figures.metric_name(run.main_metric, inline=True)
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
        "confusion": "Number of pooled held-out examples by true and predicted class, at the last evaluation.",
        "fairness": f"{main} of the last evaluated model on the held-out examples of each client, worst first. The "
        f"worst tenth is orange. The dashed line is the mean over clients.{omitted}",
        "partition": f"Number of training examples by client and {column}, and by client. Darker cells have more "
        f"examples.{some}",
    }


def _title(run: RunResults) -> str:
    names = [run.summary.get("scenario", ""), run.summary.get("strategy", "")]
    return " · ".join(name for name in names if name) or "run"


def load_template(name: str) -> Any:
    """Return a Jinja2 template from the folder ``templates`` beside this file.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as missing:
        raise MissingExtra("report.html", "report") from missing
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def data_uri(path: Path) -> str:
    """Return a PNG file as a ``data:`` address, which embeds it in a page."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


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
