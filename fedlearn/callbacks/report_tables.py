"""Return the tables of a report as rows of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.callbacks.figure_style import metric_name
from fedlearn.callbacks.formatting import NO_GUARANTEE, format_metric, human_bytes, human_seconds, interval_text
from fedlearn.callbacks.run_results import RunResults
from fedlearn.core.metrics import higher_is_better

TARGET_FRACTIONS = (0.5, 0.9, 0.95, 1.0)  # share of the improvement from the first evaluation to the best value


def headline_rows(run: RunResults) -> list[tuple[str, str]]:
    """Return the costs of a run, and its best round, as pairs (label, value)."""
    summary = run.summary
    return [
        *_best_round(summary),
        ("Time", human_seconds(summary["seconds"])),
        *([("On the clock", human_seconds(summary["clock"]))] if "clock" in summary else []),
        ("Client updates", f"{summary['client_updates']:,}"),
        ("Sent by clients", human_bytes(summary["bytes_up"])),
        ("Sent to clients", human_bytes(summary["bytes_down"])),
    ]


def _best_round(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    best = summary.get("best_checkpoint")
    if not best:
        return []
    value = format_metric(best["metric"], best["value"])
    return [(f"Best {metric_name(best['metric'], inline=True)}, round {best['round']:,}", value)]


def metric_rows(run: RunResults) -> list[dict[str, str]]:
    """Return the rows of the result table: last and best value of each metric, baselines, and values over clients.

    Rows of personal models follow, if the strategy has personal models.
    """
    last = next((line for line in reversed(run.history) if line["test"]), None)
    rows = []
    for metric, value in (last["test"] if last else {}).items():
        over_clients, best = last["clients"].get(metric, {}) if last else {}, run.summary["best"].get(metric)
        best_text = f"{format_metric(metric, best['value'])} ({best['round']})" if best else "nan"
        pooled = {"metric": metric_name(metric), "final": format_metric(metric, value), "best": best_text}
        pooled["interval"] = interval_text(metric, run.evaluation.get("metrics", {}).get(metric, {})) or "–"
        baselines = {
            name: format_metric(metric, baseline["test"].get(metric)) for name, baseline in run.baselines.items()
        }
        rows.append({**pooled, **baselines, **_client_cells(metric, over_clients)})
    rows += [
        _judged_row(run, metric) for metric in run.evaluation.get("metrics", {}) if last and metric not in last["test"]
    ]
    no_baselines = dict.fromkeys(run.baselines, "–")
    for metric, personal in (last.get("personal", {}) if last else {}).items():
        name, value = f"{metric_name(metric)}, personal models", format_metric(metric, personal["pooled"])
        pooled = {"metric": name, "final": value, "best": "–", "interval": "–"}
        rows.append({**pooled, **no_baselines, **_client_cells(metric, personal)})
    return rows


def _judged_row(run: RunResults, metric: str) -> dict[str, str]:
    """Return the row of a metric that is computed for the final model only."""
    estimate = run.evaluation["metrics"][metric]
    cells = {"metric": metric_name(metric), "final": format_metric(metric, estimate["value"]), "best": "–"}
    interval = interval_text(metric, estimate) or "–"
    return {**cells, "interval": interval, **dict.fromkeys((*run.baselines, "mean", "std", "worst10"), "–")}


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
    sign = 1 if higher_is_better(run.main_metric, run.lower_is_better) else -1
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
