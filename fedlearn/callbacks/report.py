"""The report of a run: ``report.html``, one file that is readable offline, from the files of a run folder.

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
from fedlearn.callbacks.run_history import METRICS_FILE, best_metrics, final_metrics, read_history, totals
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.metrics import higher_is_better
from fedlearn.errors import DataError, MissingExtra, require

DOTS_PER_INCH = 180
TARGET_FRACTIONS = (0.5, 0.9, 0.95, 1.0)  # of the way to the best value

log = logging.getLogger(__name__)


class Report(Callback):
    """Write ``report.html`` and its figures into the run folder at the end of a run that was not stopped.

    A report that cannot be written is logged and does not count as a failure, because all its data are in the files.

    Args:
        enabled: False writes no report.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        require(isinstance(enabled, bool), "enabled", enabled, "true or false", "enabled=true")
        self._enabled = enabled
        self._folder = Path()

    def on_start(self, run: RunInfo) -> None:
        """Note the run folder."""
        self._folder = run.folder

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the report."""
        if not self._enabled or summary["status"] == "stopped":
            return
        try:
            write_report(self._folder)
        except Exception as error:
            log.exception("no report")
            reason = error if isinstance(error, MissingExtra) else f"see {self._folder}/run.log"
            sys.stderr.write(f" no report: {reason}\n")


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """The files of a run folder as plain values; a missing file is empty.

    Attributes:
        history: lines of ``metrics.jsonl``.
        summary: contents of ``summary.json``; without that file, a summary of the history with status ``unfinished``.
        environment: contents of ``environment.json``.
        clients: rows of ``clients.csv``, with None for undefined metrics.
        partition: contents of ``partition.json``.
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
        """The main metric."""
        known = self.summary["final"]
        return self.summary.get("metric") or next((m for m in ("rmse", "hr@10") if m in known), "accuracy")


def read_run(folder: Path) -> RunResults:
    """Read a run folder.

    Raises:
        DataError: the folder is not a run folder.
    """
    if not (folder / METRICS_FILE).is_file():
        raise DataError(
            f"{folder} is no run folder: it holds no {METRICS_FILE}\n  try       the folder that a run saved"
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
    """Draw what there are data for: figure name -> PNG file."""
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
        if run.partition.get("clients"):
            drawn["partition"] = figures.partition(run.partition)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=DOTS_PER_INCH, facecolor="white")
    return {name: folder / f"{name}.png" for name in drawn}


def headline_rows(run: RunResults) -> list[tuple[str, str]]:
    """The few numbers that head the report: (what, how much)."""
    seen = run.summary
    last = seen["final"].get(run.main_metric)
    return [
        (
            figures.metric_name(run.main_metric),
            format_metric(run.main_metric, last) if run.main_metric in seen["final"] else "–",
        ),
        ("Rounds", f"{seen['rounds']:,}"),
        *_best_round(seen),
        ("Time", human_seconds(seen["seconds"])),
        *([("On the clock", human_seconds(seen["clock"]))] if "clock" in seen else []),
        ("Client updates", f"{seen['client_updates']:,}"),
        ("Sent by clients", human_bytes(seen["bytes_up"])),
        ("Sent to clients", human_bytes(seen["bytes_down"])),
    ]


def _best_round(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    best = summary.get("best_checkpoint")
    if not best:
        return []
    value = format_metric(best["metric"], best["value"])
    return [("Best round", f"{best['round']:,} ({figures.metric_name(best['metric'], inline=True)} {value})")]


def metric_rows(run: RunResults) -> list[dict[str, str]]:
    """Rows of the result table: each metric at the last evaluation, at its best, and over clients."""
    last = next((line for line in reversed(run.history) if line["test"]), None)
    rows = []
    for metric, value in (last["test"] if last else {}).items():
        spread, top = last["clients"].get(metric, {}) if last else {}, run.summary["best"].get(metric)
        shown = {key: format_metric(metric, spread.get(key)) for key in ("mean", "std", "worst10")}
        reached = f"{format_metric(metric, top['value'])} (round {top['round']})" if top else "nan"
        beside = {name: format_metric(metric, one["test"].get(metric)) for name, one in baseline_metrics(run).items()}
        own = {"metric": figures.metric_name(metric), "final": format_metric(metric, value), "best": reached}
        rows.append({**own, **beside, **shown})
    beside = dict.fromkeys(baseline_metrics(run), "–")
    for metric, seen in (last.get("personal", {}) if last else {}).items():
        shown = {key: format_metric(metric, seen[key]) for key in ("mean", "std", "worst10")}
        name = f"{figures.metric_name(metric)}, personal models"
        rows.append({"metric": name, "final": format_metric(metric, seen["pooled"]), "best": "–", **beside, **shown})
    return rows


def has_clock(run: RunResults) -> bool:
    """Whether all rounds were on a clock: that of a model of clients' speed, or of real clients at work."""
    return bool(run.history) and all("clock" in line for line in run.history)


def time_to_target_rows(run: RunResults) -> list[dict[str, str]]:
    """When the main metric first came so close to its best: share of the way from the first evaluation, value, time."""
    seen = [line for line in run.history if line["test"] and line["test"].get(run.main_metric) is not None]
    if not (has_clock(run) and len(seen) > 1):
        return []
    first, top = seen[0]["test"][run.main_metric], run.summary["best"][run.main_metric]["value"]
    sign = 1 if higher_is_better(run.main_metric) else -1
    rows = []
    for share in TARGET_FRACTIONS:
        target = first + share * (top - first)
        line = next(line for line in seen if sign * (line["test"][run.main_metric] - target) >= -1e-12)
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
    """What the federation is held against: name -> its metrics; empty where nothing was asked for."""
    return run.summary.get("baselines", {})


def privacy_rows(run: RunResults) -> list[tuple[str, str]]:
    """Rows on what was promised, what it came to and what it leaves out; none for a run without protection."""
    seen = run.summary.get("privacy")
    if not seen:
        return []
    limits = [("Withheld", seen["withheld"]), ("Not covered", "; ".join(seen["not_covered"]))]
    clip = "" if seen["clip_norm"] is None else f", clip {seen['clip_norm']:g}"
    if seen["delta"] is None:
        mechanism = f"{seen['kind']}{clip}"
        return [("Mechanism", mechanism), ("Protects", seen["adjacency"]), ("Epsilon", NO_GUARANTEE), *limits]
    by_rdp = "–" if seen["epsilon_rdp"] is None else f"{seen['epsilon_rdp']:.6g}"
    noise = []
    if seen["noise_multiplier"] is not None:
        noise = [("Noise", f"multiplier {seen['noise_multiplier']:.6g}, {seen['noise']}")]
    bound = "no bound" if seen["epsilon"] is None else f"{seen['epsilon']:.6g}"
    return [
        ("Mechanism", f"{seen['kind']}{clip}" + f" ({seen['clip']})" * bool(clip)),
        ("Protects", f"one {seen['unit']}: {seen['adjacency']}"),
        ("Epsilon", f"{bound} at delta {seen['delta']:g}"),
        ("By RDP alone", by_rdp),
        ("Budget", "none" if seen["budget"] is None else f"{seen['budget']:g}"),
        ("Sampling", seen["sampling"]),
        *noise,
        *limits,
        *(("Warning", text) for text in seen["warnings"]),
    ]


def failure_rows(run: RunResults) -> list[dict[str, Any]]:
    """Failures by client and stage, most frequent first: how often, in which round first, and why then."""
    names = {row["client"]: row["name"] for row in [*run.partition.get("clients", []), *run.clients]}
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in run.history:
        for failure in line["failures"]:
            client = failure["client"]
            first = failure | {"name": names.get(client, str(client)), "first": line["round"], "count": 0}
            found.setdefault((client, failure["stage"]), first)["count"] += 1
    return sorted(found.values(), key=lambda row: -row["count"])


def captions(run: RunResults) -> dict[str, str]:
    """What each figure shows, in a sentence or two."""
    main, inline = figures.metric_name(run.main_metric), figures.metric_name(run.main_metric, inline=True)
    undefined = sum(row.get(run.main_metric) is None for row in run.clients)
    left_out = f" {undefined} clients without a defined value are left out." if undefined else ""
    shown, population = len(run.partition.get("clients", [])), run.partition.get("num_clients", 0)
    some = f" The first {shown} of {population:,} clients are shown." if shown < population else ""
    what = "class" if run.partition.get("kind") == "labels" else "range of the target"
    return {
        "convergence": f"Loss and {inline} of the global model on held-out examples after each evaluated round: on all "
        "examples together, and over clients, each counted once (mean, one standard deviation around it, and the mean "
        "over the worst tenth).",
        "traffic": f"{main} of the global model on held-out examples against all that clients have sent until then, "
        "as it travels: compressed where updates are.",
        "time": "The same over the time since the run began, evaluation left out: on the virtual clock of the model of "
        "clients' speed, or as real clients took it.",
        "fairness": f"{main} of the last evaluated model on each client's own held-out examples, worst first; the "
        f"worst tenth is set off in orange, the dashed line is the mean over clients.{left_out}",
        "partition": f"Training examples of each {what} at each client, darker for more, and of all together.{some}",
    }


def _title(run: RunResults) -> str:
    names = [run.summary.get("scenario", ""), run.summary.get("strategy", "")]
    return " · ".join(name for name in names if name) or "run"


def load_template(name: str) -> Any:
    """One of the templates beside this file.

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
    """A PNG file as an address that holds it."""
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
