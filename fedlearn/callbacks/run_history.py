"""Record the history of a run: one line per round, stored in ``metrics.jsonl``.

Early stopping, the summary and the report read only these lines. A resumed run therefore gives the same decisions and
the same report as an uninterrupted run.
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
MAX_CONFUSION = 20  # classes of the largest confusion matrix in a line


def history_entry(round: Round) -> dict[str, Any]:
    """Return one round as plain JSON values. NaN and infinity become None.

    Returns:
        - ``round``: number of the round.
        - ``time``: end of the round, UTC, in ISO 8601.
        - ``train``: metric -> value; empty if the privacy mechanism withholds it.
        - ``test``: metric -> value on the pooled held-out examples; None without evaluation.
        - ``clients``: metric -> ``mean``, ``std`` and ``worst10`` over clients; None without evaluation.
        - ``confusion``: counts (targets x predictions) on the pooled held-out examples; absent for other tasks than
          classification, and for more than 20 classes.
        - ``lower_is_better``: metrics of the user whose low values are good; absent without such metrics.
        - ``personal``: metric -> these and ``pooled`` for personal models; absent without personal models.
        - ``held_out``: metric -> value on all clients that never train; absent without such clients.
        - ``cohort``: number of selected clients.
        - ``num_updates``: number of completions.
        - ``failures``: ``client``, ``stage`` and ``reason`` of each failure.
        - ``num_examples``: number of training examples; None if the privacy mechanism withholds it.
        - ``bytes_up``, ``bytes_down``: payload of this round from and to the clients, in bytes.
        - ``seconds``: wall-clock time of this round.
        - ``epsilon``, ``epsilon_rdp``: privacy loss of all rounds so far; None without a guarantee.
        - ``clock``: seconds since the start of the run, on the virtual clock or in a deployment; absent otherwise.
    """
    evaluation = round.evaluation
    return {
        "round": round.number,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "train": {name: finite_or_none(value) for name, value in round.metrics.items()},
        "test": evaluation and _pooled(evaluation),
        "clients": evaluation and {name: client_statistics(evaluation, name) for name in evaluation.per_client},
        **_confusion(evaluation),
        **_directions(evaluation),
        **({"personal": _personal(evaluation.personal)} if evaluation and evaluation.personal else {}),
        **({"held_out": _pooled(evaluation.held_out)} if evaluation and evaluation.held_out else {}),
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


def _pooled(evaluation: Evaluation) -> dict[str, float | None]:
    return {name: finite_or_none(value) for name, value in evaluation.pooled.items()}


def _confusion(evaluation: Evaluation | None) -> dict[str, list[list[int]]]:
    if evaluation is None or evaluation.confusion_CC is None or len(evaluation.confusion_CC) > MAX_CONFUSION:
        return {}
    return {"confusion": evaluation.confusion_CC.tolist()}


def _directions(evaluation: Evaluation | None) -> dict[str, list[str]]:
    """Return the metrics of the user whose low values are good, for readers of the file."""
    lower = [name for name in evaluation.lower_is_better if higher_is_better(name)] if evaluation else []
    return {"lower_is_better": lower} if lower else {}


def is_higher_better(history: History, metric: str) -> bool:
    """Return whether high values of a metric of a run are good."""
    last: HistoryEntry = next((line for line in reversed(history) if line["test"]), {})
    return higher_is_better(metric, last.get("lower_is_better", ()))


def client_statistics(evaluation: Evaluation, metric: str) -> dict[str, float | None]:
    """Return ``mean`` and ``std`` of a metric over clients, and ``worst10``, the mean over the worst tenth."""
    is_good_high = higher_is_better(metric, evaluation.lower_is_better)
    worst = evaluation.worst(metric, higher_is_better=is_good_high)
    return {
        "mean": finite_or_none(evaluation.mean(metric)),
        "std": finite_or_none(evaluation.std(metric)),
        "worst10": finite_or_none(worst),
    }


def _personal(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    return {
        name: {"pooled": finite_or_none(value), **client_statistics(evaluation, name)}
        for name, value in evaluation.pooled.items()
    }


def finite_or_none(value: float) -> float | None:
    """Return the value as a float, or None if it is NaN or infinite: JSON has no such number."""
    return float(value) if math.isfinite(value) else None


def metric_values(history: History, metric: str) -> list[tuple[int, float]]:
    """Return (round, pooled value) for each evaluation of a metric. An undefined value is NaN."""
    values = [(line["round"], line["test"][metric]) for line in history if line["test"] and metric in line["test"]]
    return [(number, math.nan if value is None else value) for number, value in values]


def final_metrics(history: History) -> dict[str, float | None]:
    """Return metric -> pooled value at the last evaluation; empty without an evaluation."""
    return next((dict(line["test"]) for line in reversed(history) if line["test"]), {})


def final_personal_metrics(history: History) -> dict[str, float | None]:
    """Return metric -> pooled value of the personal models at the last evaluation; empty without personal models."""
    last: HistoryEntry = next((line for line in reversed(history) if line["test"]), {})
    return {name: value["pooled"] for name, value in last.get("personal", {}).items()}


def best_metrics(history: History) -> dict[str, dict[str, Any]]:
    """Return metric -> best pooled ``value`` and the first ``round`` with this value. Omit metrics without a value."""
    best = {}
    for metric in final_metrics(history):
        sign = 1 if is_higher_better(history, metric) else -1
        defined = [(sign * value, number) for number, value in metric_values(history, metric) if not math.isnan(value)]
        if defined:
            merit, number = max(defined, key=itemgetter(0))
            best[metric] = {"value": sign * merit, "round": number}
    return best


def totals(history: History) -> dict[str, Any]:
    """Return sums over the rounds of a history.

    Returns:
        ``seconds``, ``client_updates``, ``client_failures``, ``bytes_up`` and ``bytes_down``. The key ``clock`` is the
        clock of the last round in seconds; it is absent without a clock.
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
    """Return the lines of ``metrics.jsonl``, oldest first. Omit a last line that a crash left incomplete."""
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in whole_lines if line.strip()]


def truncate_history(folder: Path, round: int) -> list[dict[str, Any]]:
    """Remove the lines after ``round`` from ``metrics.jsonl``, and return the others. A run can then resume there."""
    kept = [line for line in read_history(folder) if line["round"] <= round]
    path = Path(folder) / METRICS_FILE
    if path.exists():
        write_atomically(path, "".join(to_json_line(line) + "\n" for line in kept))
    return kept


def to_json_line(entry: HistoryEntry) -> str:
    """Return one line of ``metrics.jsonl``, without a line break.

    Raises:
        ValueError: the entry contains NaN or infinity.
    """
    return json.dumps(entry, allow_nan=False, ensure_ascii=False, separators=(", ", ": "))
