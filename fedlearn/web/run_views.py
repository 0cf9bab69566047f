"""Describe run folders for the page, as plain records. They have no arrays, no paths outside the folder and no code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.callbacks.figure_style import metric_name
from fedlearn.callbacks.formatting import PERCENT_METRICS
from fedlearn.core.metrics import higher_is_better
from fedlearn.web.history_file import ClientFailure, HistoryFile, RoundPoint
from fedlearn.web.safe_files import as_count, as_number, as_object, as_text, read_bytes, read_object

MAX_POINTS = 500  # points of a curve
TREND_POINTS = 40  # points of the small curve in the list
MAX_FACTS = 20
MAIN_METRICS = ("accuracy", "rmse", "hr@10")  # main metrics of runs whose files do not name it
# states of a run
RUNNING, STARTING, QUEUED, INTERRUPTED = "running", "starting", "queued", "interrupted"


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run in the list.

    Attributes:
        key: path of the run folder below the watched folder, with ``/``; unique.
        name: name of the run in a federation; empty for simulations.
        state: ``queued``, ``starting``, ``running``, ``interrupted``, or the status in ``summary.json``.
        reason: cause of an early end; may be empty.
        scenario: name of the scenario; may be empty.
        strategy: name of the strategy; may be empty.
        submitter: name of the person who submitted the run; empty for simulations.
        round: number of the last completed round, 0 before the first one.
        rounds: number of planned rounds; 0 if unknown.
        metric: name of the main metric, as users know it; empty before the first evaluation.
        is_share: True if the metric is shown in per cent.
        value: last value of the main metric; None before the first evaluation.
        epsilon: privacy loss so far; None without a guarantee.
        epsilon_limit: budget of the privacy loss; None for no budget.
        num_failures: number of failures of clients so far.
        bytes_up: bytes from the clients so far.
        bytes_down: bytes to the clients so far.
        seconds: duration of the last round; None before the first one.
        changed: time of the last completed round, UTC, in ISO 8601; empty before the first one.
        has_report: True if the run has ``report.html``.
        trend: main metric over the rounds, at most 40 values.
    """

    key: str
    state: str
    name: str = ""
    reason: str = ""
    scenario: str = ""
    strategy: str = ""
    submitter: str = ""
    round: int = 0
    rounds: int = 0
    metric: str = ""
    is_share: bool = False
    value: float | None = None
    epsilon: float | None = None
    epsilon_limit: float | None = None
    num_failures: int = 0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    seconds: float | None = None
    changed: str = ""
    has_report: bool = False
    trend: Sequence[float | None] = ()


@dataclass(frozen=True)
class Curve:
    """A curve of a chart: its label and one value per round of the chart."""

    label: str
    values: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart over the rounds.

    Attributes:
        title: title of the chart.
        unit: ``%``, ``s``, ``bytes`` or empty.
        limit: value of a horizontal line; None for no line.
        curves: curves of the chart.
    """

    title: str
    unit: str = ""
    limit: float | None = None
    curves: Sequence[Curve]


@dataclass(frozen=True, kw_only=True)
class RunDetail:
    """All that the page shows about one run.

    Attributes:
        run: the run as in the list.
        facts: pairs (label, text) of the run's header.
        rounds: numbers of the rounds of all charts.
        charts: charts over the rounds.
        failures: newest failures of clients, the newest first.
    """

    run: RunView
    facts: Sequence[tuple[str, str]]
    rounds: Sequence[int]
    charts: Sequence[Chart]
    failures: Sequence[ClientFailure]


def view_run(history: HistoryFile, key: str, *, is_locked: bool) -> RunView:
    """Return the run of a folder, from its files."""
    root, folder = history.root, history.folder
    summary, environment = read_object(root, folder / "summary.json"), _environment(root, folder)
    last = history.points[-1] if history.points else None
    metric = _main_metric(history, summary, environment)
    values = [point.values.get(f"test.{metric}") for point in history.points]
    header = as_object(environment.get("header"))
    return RunView(
        key=key,
        state=_state(summary, last, is_locked=is_locked),
        reason="" if is_locked else as_text(summary.get("reason")),
        scenario=as_text(summary.get("scenario")) or _first_part(header.get("scenario")),
        strategy=as_text(summary.get("strategy")) or _first_part(header.get("strategy")),
        round=last.number if last else 0,
        rounds=as_count(environment.get("rounds")) or as_count(summary.get("rounds_planned")),
        metric=metric_name(metric) if metric else "",
        is_share=metric in PERCENT_METRICS,
        value=next((value for value in reversed(values) if value is not None), None),
        epsilon=last.values.get("epsilon") if last else None,
        epsilon_limit=_epsilon_limit(environment, summary),
        num_failures=history.num_failures,
        bytes_up=history.bytes_up,
        bytes_down=history.bytes_down,
        seconds=last.values.get("seconds") if last else None,
        changed=last.time if last else "",
        has_report=(folder / "report.html").is_file(),
        trend=[values[i] for i in _sample([i for i, value in enumerate(values) if value is not None], TREND_POINTS)],
    )


def detail_run(history: HistoryFile, view: RunView) -> RunDetail:
    """Return all that the page shows about a run."""
    environment = _environment(history.root, history.folder)
    header = [(as_text(label), as_text(text)) for label, text in as_object(environment.get("header")).items()]
    points = [history.points[i] for i in _sample(list(range(len(history.points))), MAX_POINTS)]
    main = _main_metric(history, read_object(history.root, history.folder / "summary.json"), environment)
    return RunDetail(
        run=view,
        facts=header[:MAX_FACTS],
        rounds=[point.number for point in points],
        charts=_charts(points, main, view),
        failures=history.failures[::-1],
    )


def read_report(root: Path, folder: Path) -> bytes:
    """Return ``report.html`` of a run folder; empty if it has none."""
    return read_bytes(root, folder / "report.html", max_bytes=256 << 20)


def _environment(root: Path, folder: Path) -> dict[str, Any]:
    """Return the description of the run at its last start."""
    first = read_object(root, folder / "environment.json")
    resumed = first.get("resumed")
    return first | as_object(resumed[-1]) if isinstance(resumed, list) and resumed else first


def _state(summary: Mapping[str, Any], last: RoundPoint | None, *, is_locked: bool) -> str:
    if is_locked:
        return RUNNING if last else STARTING
    return as_text(summary.get("status")).replace("_", " ") or INTERRUPTED


def _main_metric(history: HistoryFile, summary: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    named = as_text(summary.get("metric")) or as_text(environment.get("metric"))
    if named or not history.points:
        return named
    curves = {name for point in history.points[-50:] for name in point.values if name.startswith("test.")}
    known = [name for name in MAIN_METRICS if f"test.{name}" in curves]
    return known[0] if known else "loss" if curves else ""


def _epsilon_limit(environment: Mapping[str, Any], summary: Mapping[str, Any]) -> float | None:
    return as_number(as_object(summary.get("privacy")).get("budget", environment.get("epsilon_limit")))


def _first_part(text: Any) -> str:
    return as_text(text).split(" · ")[0]


def _sample(places: list[int], limit: int) -> list[int]:
    """Return at most ``limit`` places, evenly spread, with the last one."""
    step = -(-len(places) // limit) if places else 1
    return places[::-1][::step][::-1]


def _charts(points: Sequence[RoundPoint], main: str, view: RunView) -> list[Chart]:
    names = dict.fromkeys(name.partition(".")[2] for point in points for name in point.values if "." in name)
    order = [*dict.fromkeys([main, "loss"]), *(name for name in names if name not in (main, "loss"))]
    charts = [_metric_chart(points, name) for name in order if name in names]
    epsilon = _chart(points, "Epsilon", {"epsilon": "Epsilon so far"}, limit=view.epsilon_limit)
    seconds = _chart(points, "Seconds per round", {"seconds": "Seconds"}, unit="s")
    clients = _chart(points, "Clients per round", {"updates": "Updates", "failures": "Failures"})
    sent = _chart(points, "Bytes per round", {"bytes_up": "From clients", "bytes_down": "To clients"}, unit="bytes")
    main_charts, others = charts[:2], charts[2:]
    return [chart for chart in (*main_charts, epsilon, seconds, clients, sent, *others) if chart.curves]


def _metric_chart(points: Sequence[RoundPoint], metric: str) -> Chart:
    direction = "higher" if higher_is_better(metric) else "lower"
    labels = {
        f"test.{metric}": "Held-out examples",
        f"mean.{metric}": "Mean over clients",
        f"worst.{metric}": "Worst tenth of clients",
        f"train.{metric}": "Training",
    }
    title = f"{metric_name(metric)} ({direction} is better)"
    return _chart(points, title, labels, unit="%" if metric in PERCENT_METRICS else "")


def _chart(
    points: Sequence[RoundPoint],
    title: str,
    labels: Mapping[str, str],
    *,
    unit: str = "",
    limit: float | None = None,
) -> Chart:
    curves = [Curve(label, [point.values.get(name) for point in points]) for name, label in labels.items()]
    return Chart(
        title=title,
        unit=unit,
        limit=limit,
        curves=[curve for curve in curves if any(value is not None for value in curve.values)],
    )
