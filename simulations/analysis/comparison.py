"""Comparison of settings over seeds: a table, and the metric over rounds and over bytes.

Runs that differ only in ``seed`` are grouped. Differences between settings are paired by seed.

Shapes: S runs of one setting (seeds), R evaluated rounds.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from fedlearn.callbacks import figures
from fedlearn.callbacks.formatting import format_metric, human_bytes, human_seconds
from fedlearn.callbacks.report import DOTS_PER_INCH, RunResults, read_run
from fedlearn.callbacks.run_history import METRICS_FILE, History
from fedlearn.callbacks.tables import markdown_table, print_table
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE
from fedlearn.core.metrics import higher_is_better
from fedlearn.errors import DataError

COLORS = (
    figures.POOLED_COLOR,
    figures.WORST_COLOR,
    figures.CENTRAL_COLOR,
    figures.LOCAL_COLOR,
    "#E69F00",
    figures.CLIENTS_COLOR,
    "#000000",
)
IGNORED_SETTINGS = (
    "seed",
    "run_name",
    "hydra",
    "defaults",
    "report",
    "callbacks",
    "checkpoint_every",
)  # settings that change no result
FILE_STEM = "compare"  # of the files


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """One run.

    Attributes:
        seed: of the run.
        rounds: that were evaluated.
        values: of the metric there, on all test examples together; NaN where undefined.
        bytes_sent: bytes by then, both ways.
        clock: seconds since the run began; NaN without a clock.
    """

    seed: int
    rounds: np.ndarray
    values: np.ndarray
    bytes_sent: np.ndarray
    clock: np.ndarray

    def cost_to_target(self, target: float, metric: str) -> tuple[int, int, float] | None:
        """Rounds, bytes and seconds on the clock to the first evaluation at or beyond a target; None: never reached."""
        good = self.values >= target if higher_is_better(metric) else self.values <= target
        if not good.any():
            return None
        first = int(np.argmax(good))
        return int(self.rounds[first]), int(self.bytes_sent[first]), float(self.clock[first])


CurvesBySetting = Mapping[str, Sequence[RunCurve]]  # label -> its runs, by seed


def read_curves(folders: Sequence[Path], metric: str | None = None) -> tuple[dict[str, list[RunCurve]], str]:
    """All evaluated runs below some folders, by what tells their settings apart; and the metric.

    Args:
        folders: of runs or of sweeps.
        metric: to compare; None takes the one that the runs lead with.

    Raises:
        DataError: there are none, or they have no such metric in common.
    """
    paths = dict.fromkeys(path.parent for folder in folders for path in sorted(folder.rglob(METRICS_FILE)))
    runs = [run for run in map(read_run, paths) if any(line["test"] for line in run.history)]
    if not runs:
        where = ", ".join(map(str, folders))
        raise DataError(
            f"{where} holds no run that was evaluated\n  try       the folder of a sweep, e.g. multirun/..."
        )
    metric = metric or runs[0].main_metric
    common = set.intersection(*({*_last_test(run.history)} for run in runs))
    if metric not in common:
        known = ", ".join(sorted(common)) or "none"
        raise DataError(
            f"the runs do not all have the metric {metric}\n  expected  one of {known}\n  try       one task"
        )
    found: dict[str, list[RunCurve]] = {}
    for run, label in zip(runs, _labels([_settings(run) for run in runs]), strict=True):
        found.setdefault(label, []).append(_seen(run, metric))
    return {label: sorted(seen, key=lambda one: one.seed) for label, seen in found.items()}, metric


def _last_test(history: History) -> Mapping[str, Any]:
    return next((line["test"] for line in reversed(history) if line["test"]), {})


def _seen(run: RunResults, metric: str) -> RunCurve:
    sent = np.cumsum([line["bytes_up"] + line["bytes_down"] for line in run.history])
    at = [i for i, line in enumerate(run.history) if line["test"]]
    values = [run.history[i]["test"][metric] for i in at]
    return RunCurve(
        seed=int(_settings(run).get("seed", run.summary.get("seed", 0))),
        rounds=np.array([run.history[i]["round"] for i in at]),
        values=np.array([math.nan if value is None else value for value in values]),
        bytes_sent=sent[at],
        clock=np.array([run.history[i].get("clock", math.nan) for i in at]),
    )


def _settings(run: RunResults) -> dict[str, Any]:
    """Return every setting by its dotted name, without the top-level settings that the scenario receives."""
    settings: Any = OmegaConf.to_container(OmegaConf.create(run.config), resolve=False)
    scenario = settings.get("scenario") or {}
    settings["scenario"] = {name: value for name, value in scenario.items() if name not in settings}
    return dict(_flat(settings))


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each run's settings from the others', in few words; the seed tells nothing.

    A builder's setting is named where it differs between runs of that builder.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for one in settings:
        for key, value in one.items():
            values.setdefault((_place(key, one), key), set()).add(json.dumps(value, default=str))
    keys = dict.fromkeys(key for one in settings for key in one if not _passes(key))
    labels = []
    for one in settings:
        named = [key for key in keys if key in one and len(values[_place(key, one), key]) > 1]
        labels.append(" · ".join(_in_words(key, one[key]) for key in named) or "all runs")
    return labels


def _place(key: str, one: Mapping[str, Any]) -> str:
    """The builder that takes a setting; empty for a setting of the run and for the choice of builders itself."""
    group = key.rpartition(".")[0]
    return "" if key.endswith("_target_") else str(one.get(f"{group}._target_", ""))


def _passes(key: str) -> bool:
    return key.split(".")[0] in IGNORED_SETTINGS or key.endswith(".seed")


def _in_words(key: str, value: Any) -> str:
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    return f"{key.removeprefix('strategy.')} {value}"


def comparison_rows(curves: CurvesBySetting, metric: str, *, target: float | None = None) -> list[dict[str, str]]:
    """A row for each setting: the metric at the end and at its best, rounds and bytes to the target, and the paired
    difference to the first setting over the seeds that both have.
    """
    first, *_ = curves.values()
    rows = []
    for label, runs in curves.items():
        row = {"setting": label, "runs": str(len(runs)), "final": _spread(metric, [one.values[-1] for one in runs])}
        best = np.nanmax if higher_is_better(metric) else np.nanmin
        row["best"] = _spread(metric, [best(one.values) for one in runs if not np.isnan(one.values).all()])
        if target is not None:
            row |= _to_target([one.cost_to_target(target, metric) for one in runs])
        row["difference"] = "–" if runs is first else _difference(metric, first, runs)
        rows.append(row)
    return rows


def _spread(metric: str, values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds (of a sample: with one seed there is none)."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "nan"
    return _mean_and_std(metric, known)


def _mean_and_std(metric: str, values: Sequence[float], sign: str = "") -> str:
    mean, percent = float(np.mean(values)), metric == "accuracy"
    scale, unit, digits = (100, " %", 1) if percent else (1, "", 4)
    beside = f" ± {scale * float(np.std(values, ddof=1)):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean:{sign}.{digits}f}{beside}{unit}"


def _to_target(reached: Sequence[tuple[int, int, float] | None]) -> dict[str, str]:
    known = [one for one in reached if one is not None]
    some = f" ({len(known)} of {len(reached)} runs)" if len(known) < len(reached) else ""
    if not known:
        return {"rounds": "never", "bytes": "–", "clock": "–"}
    rounds, sent, clock = zip(*known, strict=True)
    taken = "–" if np.isnan(clock).any() else human_seconds(float(np.mean(clock)))
    return {"rounds": f"{np.mean(rounds):.4g}{some}", "bytes": human_bytes(float(np.mean(sent))), "clock": taken}


def _difference(metric: str, first: Sequence[RunCurve], other: Sequence[RunCurve]) -> str:
    """Of the last values, run against run with the same seed, which takes out what a seed does to both."""
    ours, theirs = ({one.seed: float(one.values[-1]) for one in runs} for runs in (other, first))
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    pairs = [value for value in pairs if not math.isnan(value)]
    return _mean_and_std(metric, pairs, sign="+") if pairs else "no seed in common"


def column_headings(metric: str, target: float | None, *, has_clock: bool = False) -> dict[str, str]:
    """Of the columns of `lines`; with ``has_clock``, of the time to the target too."""
    name = figures.metric_name(metric, inline=True)
    reach = (
        {"rounds": f"rounds to {format_metric(metric, target)}", "bytes": "sent by then"} if target is not None else {}
    )
    reach |= {"clock": "on the clock"} if reach and has_clock else {}
    own = {"setting": "setting", "runs": "runs", "final": f"last {name}", "best": f"best {name}"}
    return {**own, **reach, "difference": "paired difference to the first"}


def table_rows(rows: Sequence[Mapping[str, str]], headings: Mapping[str, str]) -> list[list[str]]:
    """Return the rows of the table, headings first; a missing value is empty."""
    return [[*headings.values()], *([row.get(key, "") for key in headings] for row in rows)]


def plot_curves(curves: CurvesBySetting, metric: str, target: float | None = None) -> figures.Figure:
    """The metric over rounds and over bytes: means over seeds, and one standard deviation around them."""
    most = max(float(one.bytes_sent[-1]) for runs in curves.values() for one in runs)
    unit, size = ("MiB", 2**20) if most >= 2**20 else ("KiB", 2**10)
    figure = figures.new_figure(figures.WIDTH_INCHES, 3.3 + 0.17 * len(curves))
    over_rounds, over_bytes = figure.subplots(1, 2, sharey=True)
    for (label, runs), color in zip(curves.items(), COLORS * 10, strict=False):
        rounds, mean, std, sent = _curve(runs)
        over_rounds.fill_between(rounds, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        over_rounds.plot(rounds, mean, color=color, linewidth=1.7, label=label)
        over_bytes.plot(sent / size, mean, color=color, linewidth=1.7)
    for axis, name in ((over_rounds, "round"), (over_bytes, f"{unit} sent, both ways")):
        axis.set_xlabel(name)
        axis.grid(axis="y")
        if target is not None:
            axis.axhline(target, color=figures.TEXT_COLOR, linewidth=0.9, linestyle=":")
        if metric == "accuracy":
            axis.yaxis.set_major_formatter(lambda share, place: f"{100 * share:g} %")
    over_rounds.set_title(figures.metric_name(metric))
    over_bytes.set_title(f"{figures.metric_name(metric)} for what was sent")
    handles, labels = over_rounds.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 40 else 2)
    return figure


def _curve(runs: Sequence[RunCurve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Over the rounds that all runs of a setting evaluated."""
    rounds = np.array(sorted(set.intersection(*({*one.rounds.tolist()} for one in runs))))
    rows = [np.searchsorted(one.rounds, rounds) for one in runs]
    values_SR = np.stack([one.values[at] for one, at in zip(runs, rows, strict=True)])
    sent_SR = np.stack([one.bytes_sent[at] for one, at in zip(runs, rows, strict=True)])
    return rounds, values_SR.mean(axis=0), values_SR.std(axis=0), sent_SR.mean(axis=0)


def compare_runs(
    runs: Sequence[Path], *, metric: str | None = None, target: float | None = None, out: Path | None = None
) -> int:
    """Print a table of the settings, and write it with a figure; return the exit code.

    Args:
        runs: folders of runs or of sweeps.
        metric: metric to compare; None takes the main metric of the runs.
        target: value of the metric; the table then has the rounds, bytes and time to reach it.
        out: folder for the files; None takes the first of ``runs``.

    Raises:
        DataError: the folders hold no evaluated runs, or the runs have no such metric in common.
    """
    curves, metric = read_curves(runs, metric)
    clock = any(not np.isnan(one.clock).any() for curve in curves.values() for one in curve)
    rows = comparison_rows(curves, metric, target=target)
    heads = column_headings(metric, target, has_clock=clock)
    out = out or runs[0]
    out.mkdir(parents=True, exist_ok=True)
    table = table_rows(rows, heads)
    print_table(table)
    write_atomically(out / f"{FILE_STEM}.md", markdown_table(table))
    results = {"metric": metric, "target": target, "rows": rows}
    write_atomically(out / f"{FILE_STEM}.json", json.dumps(results, indent=1))
    with figures.style():
        plot_curves(curves, metric, target).savefig(out / f"{FILE_STEM}.png", dpi=DOTS_PER_INCH, facecolor="white")
    sys.stdout.write(f" saved     {out / f'{FILE_STEM}.png'}\n")
    return DONE
