"""Return the first screen of a report: the question, the data, and the main result with its comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlearn.callbacks.figure_style import metric_name
from fedlearn.callbacks.formatting import BASELINES, format_metric, interval_text
from fedlearn.callbacks.run_results import RunResults
from fedlearn.core.metrics import higher_is_better

MAX_SITES = 12
MAX_CLASSES_SHOWN = 12
CLINICAL_NAMES = {
    "sensitivity": ("Sensitivity", "of class {positive} are found"),
    "specificity": ("Specificity", "of class {negative} are found"),
    "ppv": ("Positive predictive value", "predictions {positive} are right"),
    "npv": ("Negative predictive value", "predictions {negative} are right"),
}


def question(run: RunResults) -> str:
    """Return the question of the run in one sentence."""
    task, classes = run.summary.get("task", ""), list(run.classes)
    name = run.target.get("name") or "the target"
    if len(classes) == 2:
        return f"Predict {name}: “{classes[1]}” (positive class) or “{classes[0]}”."
    if classes:
        shown = ", ".join(classes[:MAX_CLASSES_SHOWN]) + ", ..." * (len(classes) > MAX_CLASSES_SHOWN)
        return f"Predict {name}, one of {len(classes)} classes: {shown}."
    unit = f", in {run.target['unit']}" if run.target.get("unit") else ""
    return f"Predict {name}{unit}." + f" The task is {task}." * (task not in ("", "regression"))


def question_rows(run: RunResults) -> list[tuple[str, str]]:
    """Return pairs (label, text) on data, sites, model and strategy."""
    header, summary = run.environment.get("header", {}), run.summary
    examples = run.evaluation.get("num_examples")
    rounds = f"{summary['rounds']:,} of {summary.get('rounds_planned', summary['rounds']):,}"
    rows = [
        ("Data set", header.get("scenario", summary.get("scenario", ""))),
        ("Sites", _sites_text(run)),
        ("Judged on", f"{examples:,} examples: {run.evaluation['examples']}" if examples else ""),
        ("Model", header.get("model", "")),
        ("Strategy", header.get("strategy", summary.get("strategy", ""))),
        ("Rounds", rounds),
    ]
    return [(label, text) for label, text in rows if text]


def _sites_text(run: RunResults) -> str:
    total = run.summary.get("num_clients")
    sites = run.partition.get("clients", [])
    if not sites or not total or len(sites) < total:
        return f"{total:,} clients" if total else ""
    sizes = [site["num_examples"] for site in sites]
    low, high = min(sizes), max(sizes)
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{total:,} clients with {sum(sizes):,} training examples, {each} each"


def site_rows(run: RunResults) -> list[dict[str, str]]:
    """Return one row per client: name, training examples, held-out examples, and positives for two classes.

    More than 12 clients have no rows, because the figures show them.
    """
    held_out = {row["client"]: row["num_examples"] for row in run.clients}
    main = run.main_metric
    apart = {  # clients that never train
        row["client"]: f" (never trains; {metric_name(main)} {format_metric(main, row[main])})"
        for row in run.clients
        if row.get("held_out") and row.get(main) is not None
    }
    sites = {site["client"]: site for site in run.partition.get("clients", [])}
    judged = {site["client"]: site for site in run.evaluation.get("sites", [])}
    names = {row["client"]: row["name"] for row in [*run.clients, *sites.values()]}
    if not 0 < len(names) <= MAX_SITES:
        return []
    is_binary = len(run.classes) == 2
    return [
        {
            "name": name,
            "train": _count(sites.get(client, {}).get("num_examples", judged.get(client, {}).get("num_train"))),
            "train_positive": _share(_positives(sites.get(client)), sites.get(client)) if is_binary else "",
            "held_out": _count(held_out.get(client)) + apart.get(client, ""),
            "held_out_positive": _count(judged.get(client, {}).get("num_positive")) if is_binary else "",
        }
        for client, name in sorted(names.items())
    ]


def _positives(site: Mapping[str, Any] | None) -> int | None:
    return site["counts"][1] if site and len(site.get("counts", [])) == 2 else None


def _share(part: int | None, site: Mapping[str, Any] | None) -> str:
    if part is None or not site or not site["num_examples"]:
        return _count(part)
    return f"{part:,} ({100 * part / site['num_examples']:.0f} %)"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def main_result(run: RunResults) -> dict[str, Any]:
    """Return ``value`` of the main metric, its ``interval``, the ``verdict`` and ``comparisons``."""
    metric = run.main_metric
    estimate = run.evaluation.get("metrics", {}).get(metric) or {"value": run.summary["final"].get(metric)}
    values = {name: format_metric(metric, baseline["test"].get(metric)) for name, baseline in run.baselines.items()}
    comparisons = [
        f"{name.capitalize()} training ({BASELINES.get(name, name)}): {value}" for name, value in values.items()
    ]
    return {
        "metric": metric_name(metric),
        "value": format_metric(metric, estimate["value"]) if estimate["value"] is not None else "–",
        "interval": interval_text(metric, estimate),
        "verdict": _verdict(run, metric, estimate),
        "comparisons": comparisons,
    }


def _verdict(run: RunResults, metric: str, estimate: Mapping[str, Any]) -> str:
    """Return a comparison of the interval with the best constant prediction."""
    constant = run.evaluation.get("constant", {})
    reference = constant.get("metrics", {}).get(metric)
    if reference is None or estimate["value"] is None:
        return ""
    prediction = f"“{constant['prediction']}”" if run.classes else constant["prediction"]
    always = "A random order" if metric in ("auc", "auprc", "c_index") else f"A model that always predicts {prediction}"
    text = f"{always} has {format_metric(metric, reference)}."
    if estimate.get("low") is None:
        return text
    sign = 1 if higher_is_better(metric, run.lower_is_better) else -1
    nearest, other = sorted((sign * estimate["low"], sign * estimate["high"]))
    if nearest > sign * reference:
        return f"{text} The whole interval is better."
    if other < sign * reference:
        return f"{text} The whole interval is worse."
    return f"{text} The interval includes this value, so these examples do not show that the model is better."


def clinical_rows(run: RunResults) -> list[dict[str, str]]:
    """Return sensitivity, specificity and predictive values with their Wilson intervals; empty for other tasks."""
    clinical = run.evaluation.get("clinical")
    if not clinical:
        return []
    positive = clinical["positive_class"]
    negative = next((name for name in run.classes if name != positive), "the other class")
    return [
        {
            "name": title,
            "value": _percent(clinical[key]["value"]),
            "interval": _interval(clinical[key]),
            "meaning": f"{clinical[key]['part']:,} of {clinical[key]['whole']:,} "
            + meaning.format(positive=f"“{positive}”", negative=f"“{negative}”"),
        }
        for key, (title, meaning) in CLINICAL_NAMES.items()
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(entry: Mapping[str, Any]) -> str:
    return "–" if entry["low"] is None else f"{100 * entry['low']:.1f} to {_percent(entry['high'])}"


def class_rows(run: RunResults) -> list[dict[str, str]]:
    """Return number of examples, recall and precision of each class, for more than two classes."""
    classes: Sequence[Mapping[str, Any]] = run.evaluation.get("classes", [])
    return [
        {
            "name": entry["name"],
            "num_examples": f"{entry['num_examples']:,}",
            "num_predicted": f"{entry['num_predicted']:,}",
            "recall": _percent(entry["recall"]["value"]),
            "recall_interval": _interval(entry["recall"]),
            "precision": _percent(entry["precision"]["value"]),
            "precision_interval": _interval(entry["precision"]),
        }
        for entry in (classes if len(classes) > 2 else [])
    ]


def importance_rows(run: RunResults) -> list[dict[str, str]]:
    """Return the columns and their importance, the most important first."""
    importance = run.evaluation.get("importance", {})
    metric = importance.get("metric", "")
    return [
        {"name": column["name"], "mean": _change(metric, column["mean"]), "std": _change(metric, column["std"])}
        for column in importance.get("columns", [])
    ]


def _change(metric: str, value: float | None) -> str:
    """Return a change of a metric; for shares in percentage points."""
    text = format_metric(metric, value)
    return text.replace(" %", " points") if text.endswith(" %") else text


def subgroup_rows(run: RunResults) -> list[dict[str, str]]:
    """Return the groups of examples with number, main metric and interval. Small groups have no value."""
    rows = []
    for entry in run.evaluation.get("subgroups", []):
        metric = entry.get("metric", run.main_metric)
        for group in entry.get("groups", []):
            is_small = group["suppressed"]
            value = "not shown" if is_small or "value" not in group else format_metric(metric, group["value"])
            rows.append(
                {
                    "column": entry["column"],
                    "name": group["name"],
                    "num_examples": "fewer than 10" if is_small else f"{group['num_examples']:,}",
                    "metric": metric_name(metric),
                    "value": value,
                    "interval": interval_text(metric, group),
                }
            )
    return rows
