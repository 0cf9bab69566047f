"""The history of a run: one line per round, as ``metrics.jsonl`` holds it.

Early stopping, the summary and the report read only these lines. So a resumed run decides and reports as an
uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.metrics import higher_is_better
from fedlearn.core.records import Evaluation, Round

HistoryEntry = Mapping[str, Any]
History = Sequence[HistoryEntry]
METRICS_FILE = "metrics.jsonl"


def history_entry(round: Round) -> dict[str, Any]:
    """Return one round as plain JSON values; NaN and infinity become None.

    Keys: ``round``, ``time`` (UTC, ISO 8601), ``train`` and ``test`` (metric -> value; ``test`` is None in a round
    without evaluation), ``clients`` (metric -> ``mean``, ``std`` and ``worst10`` over clients, or None), ``personal``
    (the same and ``pooled``, of models that clients keep beside the global one; where there are any), ``cohort`` and
    ``num_updates`` (clients asked, and those that delivered), ``failures``, ``num_examples``, ``bytes_up`` and
    ``bytes_down`` (of this round), ``seconds``, ``epsilon`` and ``epsilon_rdp`` (of all rounds so far; None without
    protection); ``clock`` (seconds since the run began) where there is a clock. ``num_examples`` is None, and ``train``
    empty, where a protection withholds them.
    """
    seen = round.evaluation
    return {
        "round": round.number,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "train": {name: finite_or_none(value) for name, value in round.metrics.items()},
        "test": seen and {name: finite_or_none(value) for name, value in seen.pooled.items()},
        "clients": seen and {name: client_statistics(seen, name) for name in seen.per_client},
        **({"personal": _personal(seen.personal)} if seen and seen.personal else {}),
        "cohort": len(round.cohort),
        "num_updates": round.num_updates,
        "failures": [{"client": f.client, "stage": f.stage, "reason": f.reason} for f in round.failures],
        "num_examples": round.num_examples,
        "bytes_up": int(round.bytes_up),
        "bytes_down": int(round.bytes_down),
        "seconds": float(round.seconds),
        "epsilon": round.privacy and finite_or_none(round.privacy.value),
        "epsilon_rdp": round.privacy and finite_or_none(round.privacy.rdp),
        **({} if round.clock is None else {"clock": float(round.clock)}),
    }


def client_statistics(evaluation: Evaluation, metric: str) -> dict[str, float | None]:
    """Return mean and standard deviation of a metric over clients, and the mean over the worst tenth of them."""
    worst = evaluation.worst(metric, higher_is_better=higher_is_better(metric))
    return {
        "mean": finite_or_none(evaluation.mean(metric)),
        "std": finite_or_none(evaluation.std(metric)),
        "worst10": finite_or_none(worst),
    }


def _personal(seen: Evaluation) -> dict[str, dict[str, float | None]]:
    return {
        name: {"pooled": finite_or_none(value), **client_statistics(seen, name)} for name, value in seen.pooled.items()
    }


def finite_or_none(value: float) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if math.isfinite(value) else None


def metric_values(history: History, metric: str) -> list[tuple[int, float]]:
    """(round, pooled value) of a metric where it was measured; NaN where it was undefined."""
    seen = [(line["round"], line["test"][metric]) for line in history if line["test"] and metric in line["test"]]
    return [(number, math.nan if value is None else value) for number, value in seen]


def final_metrics(history: History) -> dict[str, float | None]:
    """Metric -> pooled value at the last evaluation."""
    return next((dict(line["test"]) for line in reversed(history) if line["test"]), {})


def final_personal_metrics(history: History) -> dict[str, float | None]:
    """Metric -> pooled value of clients' personal models at the last evaluation; empty where there are none."""
    last: HistoryEntry = next((line for line in reversed(history) if line["test"]), {})
    return {name: value["pooled"] for name, value in last.get("personal", {}).items()}


def best_metrics(history: History) -> dict[str, dict[str, Any]]:
    """Metric -> best pooled ``value`` and the first ``round`` that reached it; metrics never defined are left out."""
    found = {}
    for metric in final_metrics(history):
        sign = 1 if higher_is_better(metric) else -1
        defined = [(sign * value, number) for number, value in metric_values(history, metric) if not math.isnan(value)]
        if defined:
            merit, number = max(defined, key=itemgetter(0))
            found[metric] = {"value": sign * merit, "round": number}
    return found


def totals(history: History) -> dict[str, Any]:
    """Sums over rounds: ``seconds``, ``client_updates``, ``client_failures``, ``bytes_up``, ``bytes_down``; and
    ``clock`` at the end, where there is one.
    """
    clock = {"clock": history[-1]["clock"]} if history and "clock" in history[-1] else {}
    return {
        "seconds": sum(line["seconds"] for line in history),
        "client_updates": sum(line["num_updates"] for line in history),
        "client_failures": sum(len(line["failures"]) for line in history),
        "bytes_up": sum(line["bytes_up"] for line in history),
        "bytes_down": sum(line["bytes_down"] for line in history),
        **clock,
    }


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder, oldest first; a last line that was cut short by a crash is left out."""
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in whole_lines if line.strip()]


def truncate_history(folder: Path, round: int) -> list[dict[str, Any]]:
    """Forget what was measured after ``round``, so that the run can go on from there, and return what is left."""
    kept = [line for line in read_history(folder) if line["round"] <= round]
    path = Path(folder) / METRICS_FILE
    if path.exists():
        write_atomically(path, "".join(to_json_line(line) + "\n" for line in kept))
    return kept


def to_json_line(entry: HistoryEntry) -> str:
    """One line of ``metrics.jsonl``."""
    return json.dumps(entry, allow_nan=False, ensure_ascii=False, separators=(", ", ": "))
