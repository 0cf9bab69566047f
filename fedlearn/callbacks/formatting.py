"""Format values and lines for the console and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlearn.callbacks.data_check import header_text
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Failure, Round

PERCENT_METRICS = ("accuracy", "balanced_accuracy", "attack_success")  # shares of examples, shown in per cent
BASELINES = {
    "central": "one model, trained on the pooled data",
    "local": "one model per client, trained on its own data",
}
NO_GUARANTEE = "no differential privacy"


def header_lines(run: RunInfo) -> list[tuple[str, str]]:
    """Return the lines of the header as pairs (label, text)."""
    sent = run.bytes_per_update if run.bytes_per_update is not None else 4 * run.num_parameters
    model = [run.model, f"{run.num_parameters:,} parameters", f"{human_bytes(sent)} per update", run.initialization]
    data = [run.scenario, f"{run.num_clients:,} clients", _range(run.examples_per_client), run.source]
    lines = [
        ("scenario", data),
        ("model", model),
        ("strategy", [run.strategy, run.strategy_settings, run.cohort]),
        ("protect", guarantee_parts(run.privacy)),
        ("engine", [run.engine, run.machine, f"seed {run.seed}"]),
    ]
    lines += [("system", [run.system])] if run.system else []
    before_engine = next(i for i, (label, _) in enumerate(lines) if label == "engine")
    optional = (("training", run.training), ("compress", run.compress), ("poisoning", run.poisoning))
    extra = [*((label, text) for label, text in optional if text), *limitation_lines(run.privacy)]
    lines[before_engine:before_engine] = [(label, [text]) for label, text in extra]
    lines += [("data check", [header_text(run.data_check)])] if run.data_check is not None else []
    lines += [("resumed", [f"after round {run.start_round} of {run.rounds}"])] if run.start_round else []
    return [(label, " · ".join(part for part in parts if part)) for label, parts in lines]


def guarantee_parts(privacy: Mapping[str, Any]) -> list[str]:
    """Return the parts of the header line on a privacy guarantee; ``["none"]`` without a guarantee.

    Args:
        privacy: description of the guarantee, see `RunInfo.privacy`.
    """
    if not privacy:
        return ["none"]
    budget = f"epsilon at most {privacy['budget']:g}, " if privacy.get("budget") else ""
    parts = [f"{privacy['kind']}: {privacy['adjacency']}"]
    parts += [] if privacy["delta"] is None else [f"{budget}delta {privacy['delta']:g}"]
    if privacy["clip_norm"] is not None:
        parts.append(f"clip {privacy['clip_norm']:g}{' (adaptive)' * (privacy['clip'] == 'adaptive')}")
    if privacy["delta"] is None:
        return [*parts, NO_GUARANTEE]
    if privacy["noise_multiplier"] is not None:
        parts.append(f"noise multiplier {privacy['noise_multiplier']:.4g} {privacy['noise']}")
    return [*parts, f"sampling {privacy['sampling']}"]


def limitation_lines(privacy: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the header lines (label, text) on releases that the guarantee does not cover, and its warnings."""
    if not privacy:
        return []
    covered = f"{'; '.join(privacy['not_covered'])} (not sent: {privacy['withheld']})"
    return [("uncovered", covered), *(("warning", text) for text in privacy["warnings"])]


def format_epsilon(value: float | None) -> str:
    """Return an epsilon in at most four characters, rounded up: a privacy loss is never understated.

    >>> [format_epsilon(value) for value in (None, 0.0, 0.00123, 0.0155, 2.3817, 17.86, 153.1)]
    ['–', '0.00', '<.01', '0.02', '2.39', '17.9', '154']
    """
    if value is None:
        return "–"
    if math.isinf(value):
        return "inf"
    if 0 < value < 0.01:
        return "<.01"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def format_metric(metric: str, value: float | None) -> str:
    """Return the value of a metric for tables. Accuracy and backdoor success are in per cent.

    >>> values = (("accuracy", 0.6123), ("loss", 0.6814), ("rmse", 53.8), ("loss", 2937.2), ("auc", None))
    >>> [format_metric(metric, value) for metric, value in values]
    ['61.2 %', '0.681', '53.80', '2937', 'nan']
    """
    if value is None or math.isnan(value):
        return "nan"
    if metric in PERCENT_METRICS:
        return f"{100 * value:.1f} %"
    if abs(value) >= 1000:
        return f"{value:.4g}"
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"


def interval_text(metric: str, estimate: Mapping[str, Any]) -> str:
    """Return the 95 % interval of a metric; empty if it is unknown."""
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None:
        return ""
    return f"{format_metric(metric, low).removesuffix(' %')} to {format_metric(metric, high)}"


def summary_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines (label, text) on the end of a run.

    Args:
        summary: content of ``summary.json``.
    """
    main = summary.get("metric") or "loss"
    rounds, failures = summary["rounds"], summary["client_failures"]
    parts = [f"{rounds} round{'s' * (rounds != 1)} in {human_seconds(summary['seconds'])}"]
    parts += [f"{human_seconds(summary['clock'])} on the clock"] if "clock" in summary else []
    if main in summary["final"]:
        parts.append(f"{main} {format_metric(main, summary['final'][main])}")
    if main in summary.get("personal", {}):
        parts.append(f"personal models {format_metric(main, summary['personal'][main])}")
    if main in summary["best"]:
        best = summary["best"][main]
        parts.append(f"best {format_metric(main, best['value'])} at round {best['round']}")
    status = "done" if summary["status"] in ("early_stopped", "budget_exhausted") else str(summary["status"])
    lines = [(status, " · ".join(parts))]
    for name, baseline in summary.get("baselines", {}).items():
        lines.append((name, f"{main} {format_metric(main, baseline['test'].get(main))} · {BASELINES[name]}"))
    lines += [("privacy", format_privacy_spent(summary["privacy"]))] if summary.get("privacy") else []
    lines += [("warning", text) for text in summary.get("warnings", ())]
    lines += [("because", summary["reason"])] if summary["reason"] else []
    lines += [("failures", f"{failures} of {failures + summary['client_updates']} client updates")] if failures else []
    lines += [("callbacks", format_callback_failure(failure)) for failure in summary.get("callback_failures", ())]
    return lines


def format_callback_failure(failure: Mapping[str, Any]) -> str:
    """Return one line on the failure of a callback, from an entry of ``callback_failures`` in the summary."""
    stages = {"on_start": "at the start", "on_end": "at the end", "close": "while it closed"}
    stage = stages.get(failure["method"], f"in round {failure['round']}")
    return f"{failure['callback']} failed {stage}: {failure['error']}"


def format_privacy_spent(privacy: Mapping[str, Any]) -> str:
    """Return one line on the privacy loss of a run: epsilon, delta and adjacency.

    Args:
        privacy: entry ``privacy`` of ``summary.json``.
    """
    if privacy["delta"] is None:
        return f"{privacy['kind']}: {privacy['adjacency']}, {NO_GUARANTEE}"
    value, rdp = privacy["epsilon"], privacy["epsilon_rdp"]
    amount = "epsilon without bound" if value is None else f"epsilon {value:.4g}"
    by_rdp = f" ({rdp:.4g} by RDP)" if rdp is not None and rdp != value else ""
    return f"{amount}{by_rdp} at delta {privacy['delta']:g} for {privacy['adjacency']}"


def describe_failure(failure: Failure, run: RunInfo) -> str:
    """Return a phrase on a failure: name and id of the client, failure stage and reason."""
    name = run.name(failure.client)
    client = f"client {failure.client}" if name == str(failure.client) else f"{name} (client {failure.client})"
    return f"{client} failed in {failure.stage}: {failure.reason}"


def failure_notice(round: Round, run: RunInfo) -> str:
    """Return one line on the failures of a round: the first failure, and the number of others."""
    others = len(round.failures) - 1
    more = f" (and {others} more)" if others else ""
    return f" round {round.number}: {describe_failure(round.failures[0], run)}{more}"


def human_bytes(count: float) -> str:
    """Return a number of bytes in binary units.

    >>> [human_bytes(count) for count in (0, 999, 1924, 7696, 76960, 5 * 2**30)]
    ['0 B', '999 B', '1.9 KiB', '7.5 KiB', '75 KiB', '5.0 GiB']
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, with about two digits.

    >>> [human_seconds(seconds) for seconds in (0.0124, 0.94, 41.7, 250, 8000)]
    ['0.01 s', '0.9 s', '42 s', '4.2 min', '2.2 h']
    """
    if seconds < 0.1:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _range(examples: tuple[int, int] | None) -> str:
    if examples is None:
        return ""
    low, high = examples
    return f"{low:,} examples each" if low == high else f"{low:,}-{high:,} examples"


def relative_path(path: Path) -> str:
    """Return the shortest path that a user can type: relative to the current folder if it is inside it."""
    here = Path.cwd()
    full = path.resolve()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)
