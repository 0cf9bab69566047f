"""Compare settings over seeds: a table, and a figure of the metric over rounds and over bytes.

Runs that differ only in ``seed`` are grouped. Differences between settings are paired by seed.

Shapes: S runs of one setting (seeds), R evaluated rounds.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from fedlearn.callbacks import figure_style
from fedlearn.callbacks.figure_style import DOTS_PER_INCH
from fedlearn.callbacks.formatting import format_metric, human_bytes, human_seconds
from fedlearn.callbacks.run_history import METRICS_FILE, History, is_higher_better
from fedlearn.callbacks.run_results import RunResults, read_run
from fedlearn.callbacks.tables import markdown_table, print_table
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE
from fedlearn.errors import DataError

COLORS = (
    figure_style.POOLED_COLOR,
    figure_style.WORST_COLOR,
    figure_style.CENTRAL_COLOR,
    figure_style.LOCAL_COLOR,
    "#E69F00",
    figure_style.CLIENTS_COLOR,
    "#000000",
)
# settings that do not change a result
IGNORED_SETTINGS = (
    "seed",
    "run_name",
    "hydra",
    "defaults",
    "report",
    "callbacks",
    "checkpoint_every",
    "num_cores",
    "num_jobs",
)
SCENARIO_KEYS = ("_target_", "path", "target")  # settings of a scenario that choose the data and the question
FILE_STEM = "compare"  # names of the files without suffix


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """Metric, bytes and time of one run, at its evaluated rounds.

    Attributes:
        seed: seed of the run.
        rounds: numbers of the evaluated rounds.
        values: pooled metric on all test examples; NaN if undefined.
        bytes_sent: bytes sent up to the round, in both directions.
        clock: seconds of the virtual clock up to the round; NaN without a clock.
        is_higher_better: True if high values of the metric are good.
    """

    seed: int
    rounds: np.ndarray
    values: np.ndarray
    bytes_sent: np.ndarray
    clock: np.ndarray
    is_higher_better: bool = True

    def cost_to_target(self, target: float) -> tuple[int, int, float] | None:
        """Return rounds, bytes and clock seconds to the first evaluation that reaches a target; None if none does."""
        reached = self.values >= target if self.is_higher_better else self.values <= target
        if not reached.any():
            return None
        first = int(np.argmax(reached))
        return int(self.rounds[first]), int(self.bytes_sent[first]), float(self.clock[first])


CurvesBySetting = Mapping[str, Sequence[RunCurve]]  # label of a setting -> its runs, in order of seeds


def read_curves(folders: Sequence[Path], metric: str | None = None) -> tuple[dict[str, list[RunCurve]], str]:
    """Read all evaluated runs below some folders.

    Args:
        folders: folders of runs or of sweeps.
        metric: metric to compare; None uses the main metric of the runs.

    Returns:
        Runs by the label of their settings, and the metric.

    Runs with equal settings and an equal seed are repetitions, not evidence. Only the longest of them counts, the last
    one among equally long ones; the others are named on standard error.

    Raises:
        DataError: There is no evaluated run, the runs have different scenarios, or some run lacks the metric.
    """
    paths = dict.fromkeys(path.parent for folder in folders for path in sorted(folder.rglob(METRICS_FILE)))
    read = {path: read_run(path) for path in paths}
    read = {path: run for path, run in read.items() if any(line["test"] for line in run.history)}
    _require_same_scenario(read)
    runs = _without_repetitions(read)
    if not runs:
        where = ", ".join(map(str, folders))
        raise DataError(
            f"{where} has no evaluated run\n  expected  folders of runs\n"
            "  advice    the folder of a sweep, e.g. multirun/..."
        )
    metric = metric or runs[0].main_metric
    common = set.intersection(*({*_last_test(run.history)} for run in runs))
    if metric not in common:
        known = ", ".join(sorted(common)) or "none"
        raise DataError(
            f"not all runs have the metric {metric}\n  expected  one of {known}\n"
            "  advice    folders of runs with one task"
        )
    curves: dict[str, list[RunCurve]] = {}
    for run, label in zip(runs, _labels([_settings(run) for run in runs]), strict=True):
        curves.setdefault(label, []).append(_read_curve(run, metric))
    return {label: sorted(group, key=lambda curve: curve.seed) for label, group in curves.items()}, metric


def _require_same_scenario(runs: Mapping[Path, RunResults]) -> None:
    """Raise a `DataError` if the runs have different scenarios or data, because their metrics do not compare."""
    folders: dict[tuple[str, ...], list[Path]] = {}
    for path, run in runs.items():
        settings = _settings(run)
        builder, path_name, target = (str(settings.get(f"scenario.{key}") or "") for key in SCENARIO_KEYS)
        problem = (builder, Path(path_name).name, target)  # equal data may be in two places
        folders.setdefault(problem, []).append(path)
    if len(folders) > 1:
        problems = "; ".join(f"{_scenario_name(problem)} in {paths[0]}" for problem, paths in folders.items())
        first = " ".join(shlex.quote(str(path)) for path in next(iter(folders.values())))
        raise DataError(
            f"the runs have different scenarios or data: {problems}\n  expected  runs of one scenario\n"
            f"  try       python -m simulations.compare {first}"
        )


def _scenario_name(problem: Sequence[str]) -> str:
    target, *data = problem
    return " ".join([target.rpartition(".")[2] or "no scenario", *filter(None, data)])


def _without_repetitions(runs: Mapping[Path, RunResults]) -> list[RunResults]:
    kept: dict[str, Path] = {}
    for path, run in sorted(runs.items(), key=lambda item: len(item[1].history)):  # the longest and last run replaces
        settings = {key: value for key, value in _settings(run).items() if key == "seed" or not _is_ignored(key)}
        key = json.dumps(settings, sort_keys=True, default=str)
        if key in kept:
            sys.stderr.write(f" note      {kept[key]} has the settings and the seed of {path}, and does not count\n")
        kept[key] = path
    return [run for path, run in runs.items() if path in kept.values()]


def _last_test(history: History) -> Mapping[str, Any]:
    return next((line["test"] for line in reversed(history) if line["test"]), {})


def _read_curve(run: RunResults, metric: str) -> RunCurve:
    sent = np.cumsum([line["bytes_up"] + line["bytes_down"] for line in run.history])
    evaluated = [i for i, line in enumerate(run.history) if line["test"]]
    values = [run.history[i]["test"][metric] for i in evaluated]
    return RunCurve(
        seed=int(_settings(run).get("seed", run.summary.get("seed", 0))),
        rounds=np.array([run.history[i]["round"] for i in evaluated]),
        values=np.array([math.nan if value is None else value for value in values]),
        bytes_sent=sent[evaluated],
        clock=np.array([run.history[i].get("clock", math.nan) for i in evaluated]),
        is_higher_better=is_higher_better(run.history, metric),
    )


def _settings(run: RunResults) -> dict[str, Any]:
    """Return every setting by its dotted name, without the top-level settings that the scenario receives."""
    settings: Any = OmegaConf.to_container(OmegaConf.create(run.config), resolve=False)
    scenario = settings.get("scenario") or {}
    settings["scenario"] = {name: value for name, value in scenario.items() if name not in settings}
    return dict(_flatten(settings))


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a short label for each run: the settings in which it differs from other runs, without the seed.

    A setting of a builder is part of the label only if it differs between runs of this builder.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for run in settings:
        for key, value in run.items():
            values.setdefault((_builder(key, run), key), set()).add(json.dumps(value, default=str))
    keys = dict.fromkeys(key for run in settings for key in run if not _is_ignored(key))
    labels = []
    for run in settings:
        different = [key for key in keys if key in run and len(values[_builder(key, run), key]) > 1]
        labels.append(" · ".join(_describe(key, run[key]) for key in different) or "all runs")
    return labels


def _builder(key: str, settings: Mapping[str, Any]) -> str:
    """Return the builder of a setting; empty for a setting of the run, and for the choice of a builder."""
    group = key.rpartition(".")[0]
    return "" if key.endswith("_target_") else str(settings.get(f"{group}._target_", ""))


def _is_ignored(key: str) -> bool:
    return key.split(".")[0] in IGNORED_SETTINGS or key.endswith(".seed")


def _describe(key: str, value: Any) -> str:
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    return f"{key.removeprefix('strategy.')} {value}"


def comparison_rows(curves: CurvesBySetting, metric: str, *, target: float | None = None) -> list[dict[str, str]]:
    """Return a row for each setting.

    A row has the last and the best metric. With ``target``, it has rounds, bytes and time to reach it. It also has the
    paired difference to the first setting, over their common seeds.
    """
    first, *_ = curves.values()
    rows = []
    for label, runs in curves.items():
        row = {"setting": label, "runs": str(len(runs)), "last_round": _range([int(run.rounds[-1]) for run in runs])}
        row |= {"final": _spread(metric, [run.values[-1] for run in runs])}
        best = np.nanmax if runs[0].is_higher_better else np.nanmin
        row["best"] = _spread(metric, [best(run.values) for run in runs if not np.isnan(run.values).all()])
        if target is not None:
            row |= _to_target([run.cost_to_target(target) for run in runs])
        row["difference"] = "–" if runs is first else _difference(metric, first, runs)
        rows.append(row)
    return rows


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _spread(metric: str, values: Sequence[float]) -> str:
    """Return the mean over seeds, and the sample standard deviation if there are two seeds or more."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "nan"
    return _mean_and_std(metric, known)


def _mean_and_std(metric: str, values: Sequence[float], sign: str = "") -> str:
    mean, percent = float(np.mean(values)), metric == "accuracy"
    scale, unit, digits = (100, " %", 1) if percent else (1, "", 4)
    deviation = f" ± {scale * float(np.std(values, ddof=1)):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean:{sign}.{digits}f}{deviation}{unit}"


def _to_target(costs: Sequence[tuple[int, int, float] | None]) -> dict[str, str]:
    reached = [cost for cost in costs if cost is not None]
    some = f" ({len(reached)} of {len(costs)} runs)" if len(reached) < len(costs) else ""
    if not reached:
        return {"rounds": "never", "bytes": "–", "clock": "–"}
    rounds, sent, clock = zip(*reached, strict=True)
    seconds = "–" if np.isnan(clock).any() else human_seconds(float(np.mean(clock)))
    return {"rounds": f"{np.mean(rounds):.4g}{some}", "bytes": human_bytes(float(np.mean(sent))), "clock": seconds}


def _difference(metric: str, first: Sequence[RunCurve], other: Sequence[RunCurve]) -> str:
    """Return the difference of the last values, paired by seed. Pairing removes the common effect of a seed."""
    ours, theirs = ({run.seed: float(run.values[-1]) for run in runs} for runs in (other, first))
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    pairs = [value for value in pairs if not math.isnan(value)]
    return _mean_and_std(metric, pairs, sign="+") if pairs else "no seed in common"


def column_headings(
    metric: str, target: float | None, *, has_clock: bool = False, rounds_differ: bool = False
) -> dict[str, str]:
    """Return the headings of the columns of `comparison_rows`.

    Args:
        metric: metric to compare.
        target: value of the metric; adds rounds and bytes to reach it.
        has_clock: adds the time to the target.
        rounds_differ: adds the round of the last evaluation.
    """
    name = figure_style.metric_name(metric, inline=True)
    reach = (
        {"rounds": f"rounds to {format_metric(metric, target)}", "bytes": "bytes sent"} if target is not None else {}
    )
    reach |= {"clock": "on the clock"} if reach and has_clock else {}
    always = {"setting": "setting", "runs": "runs", **({"last_round": "last round"} if rounds_differ else {})}
    always |= {"final": f"last {name}", "best": f"best {name}"}
    return {**always, **reach, "difference": "paired difference to the first"}


def table_rows(rows: Sequence[Mapping[str, str]], headings: Mapping[str, str]) -> list[list[str]]:
    """Return the rows of the table, headings first. A missing value is empty."""
    return [[*headings.values()], *([row.get(key, "") for key in headings] for row in rows)]


def plot_curves(curves: CurvesBySetting, metric: str, target: float | None = None) -> figure_style.Figure:
    """Draw the metric over rounds and over bytes: means over seeds, with one standard deviation around them."""
    most = max(float(run.bytes_sent[-1]) for runs in curves.values() for run in runs)
    unit, size = ("MiB", 2**20) if most >= 2**20 else ("KiB", 2**10)
    figure = figure_style.new_figure(figure_style.WIDTH_INCHES, 3.3 + 0.17 * len(curves))
    over_rounds, over_bytes = figure.subplots(1, 2, sharey=True)
    for (label, runs), color in zip(curves.items(), COLORS * 10, strict=False):
        rounds, mean, std, sent = _curve(runs)
        over_rounds.fill_between(rounds, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        over_rounds.plot(rounds, mean, color=color, linewidth=1.7, label=label)
        over_bytes.plot(sent / size, mean, color=color, linewidth=1.7)
    for axis, name in ((over_rounds, "round"), (over_bytes, f"{unit} sent, both directions")):
        axis.set_xlabel(name)
        axis.grid(axis="y")
        if target is not None:
            axis.axhline(target, color=figure_style.TEXT_COLOR, linewidth=0.9, linestyle=":")
        if metric == "accuracy":
            axis.yaxis.set_major_formatter(lambda share, place: f"{100 * share:g} %")
    over_rounds.set_title(figure_style.metric_name(metric))
    over_bytes.set_title(f"{figure_style.metric_name(metric)} by bytes sent")
    handles, labels = over_rounds.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 40 else 2)
    return figure


def _curve(runs: Sequence[RunCurve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return rounds, mean, standard deviation and bytes, at the rounds that all runs evaluated."""
    rounds = np.array(sorted(set.intersection(*({*run.rounds.tolist()} for run in runs))))
    rows = [np.searchsorted(run.rounds, rounds) for run in runs]
    values_SR = np.stack([run.values[row_R] for run, row_R in zip(runs, rows, strict=True)])
    sent_SR = np.stack([run.bytes_sent[row_R] for run, row_R in zip(runs, rows, strict=True)])
    return rounds, values_SR.mean(axis=0), values_SR.std(axis=0), sent_SR.mean(axis=0)


def compare_runs(
    runs: Sequence[Path], *, metric: str | None = None, target: float | None = None, out: Path | None = None
) -> int:
    """Print a table of the settings, write it with a figure, and return the exit code.

    Args:
        runs: folders of runs or of sweeps.
        metric: metric to compare; None uses the main metric of the runs.
        target: value of the metric; the table then has the rounds, bytes and time to reach it.
        out: folder for the files; None uses the first of ``runs``.

    Raises:
        DataError: There is no evaluated run, or some run lacks the metric.
    """
    curves, metric = read_curves(runs, metric)
    has_clock = any(not np.isnan(run.clock).any() for group in curves.values() for run in group)
    rows = comparison_rows(curves, metric, target=target)
    rounds_differ = len({int(run.rounds[-1]) for group in curves.values() for run in group}) > 1
    headings = column_headings(metric, target, has_clock=has_clock, rounds_differ=rounds_differ)
    out = out or runs[0]
    out.mkdir(parents=True, exist_ok=True)
    table = table_rows(rows, headings)
    print_table(table)
    write_atomically(out / f"{FILE_STEM}.md", markdown_table(table))
    results = {"metric": metric, "target": target, "rows": rows}
    write_atomically(out / f"{FILE_STEM}.json", json.dumps(results, indent=1))
    with figure_style.style():
        plot_curves(curves, metric, target).savefig(out / f"{FILE_STEM}.png", dpi=DOTS_PER_INCH, facecolor="white")
    sys.stdout.write(f" saved     {out / f'{FILE_STEM}.png'}\n")
    return DONE
