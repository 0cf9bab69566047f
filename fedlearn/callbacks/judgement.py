"""Return warnings on the last evaluation of a run.

They follow from the lines of ``metrics.jsonl``, so a resumed run has the same warnings as an uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlearn.callbacks.run_history import History, HistoryEntry, metric_values

MIN_EXAMPLES, MIN_RECALL = 10, 0.1  # a class with a smaller recall is named, if it has this many examples
DIVERGED = 10.0  # factor from the best loss to the last loss


def last_confusion(history: History) -> np.ndarray | None:
    """Return the confusion counts (targets x predictions) of the last evaluation, ``(C, C)``; None if unknown."""
    last = _last_evaluated(history)
    return np.array(last["confusion"]) if last and last.get("confusion") else None


def _majority_share(confusion_CC: np.ndarray) -> float:
    """Return the share of the largest class, which is the accuracy of a model that always predicts this class."""
    return float(confusion_CC.sum(axis=1).max() / confusion_CC.sum())


def result_warnings(history: History, classes: Sequence[str] = ()) -> list[str]:
    """Return a sentence for each sign that the model of the last evaluation is of no use.

    Args:
        history: lines of the run.
        classes: names of the classes; default their numbers.
    """
    last = _last_evaluated(history)
    if last is None:
        return []
    return [*_divergence(history), *_classification(last_confusion(history), classes), *_regression(last["test"])]


def _last_evaluated(history: History) -> HistoryEntry | None:
    return next((line for line in reversed(history) if line["test"]), None)


def _divergence(history: History) -> list[str]:
    losses = metric_values(history, "loss")
    if not losses:
        return []
    number, last = losses[-1]
    advice = "a smaller local.learning_rate can help"
    if math.isnan(last):
        return [f"the loss is not finite after round {number}; {advice}"]
    best, best_round = min((loss, round) for round, loss in losses if not math.isnan(loss))
    if last > DIVERGED * max(best, 1e-6):
        return [f"the loss grew from {best:.4g} after round {best_round} to {last:.4g}; {advice}"]
    return []


def _classification(confusion_CC: np.ndarray | None, classes: Sequence[str]) -> list[str]:
    if confusion_CC is None or np.count_nonzero(confusion_CC.sum(axis=1)) < 2:
        return []
    names = classes if len(classes) == len(confusion_CC) else [str(number) for number in range(len(confusion_CC))]
    share, accuracy = _majority_share(confusion_CC), float(np.trace(confusion_CC) / confusion_CC.sum())
    predicted = np.flatnonzero(confusion_CC.sum(axis=0))
    if len(predicted) == 1:
        only = names[predicted[0]]
        return [f"the model predicts class {only} for all held-out examples; accuracy is {100 * accuracy:.1f} %"]
    if accuracy <= share:
        return [f"accuracy {100 * accuracy:.1f} % is not above {100 * share:.1f} %, the share of the largest class"]
    return _overlooked_classes(confusion_CC, names)


def _overlooked_classes(confusion_CC: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return a sentence on the classes of which the model finds less than a tenth of the examples."""
    target_C, hit_C = confusion_CC.sum(axis=1), np.diag(confusion_CC)
    overlooked = np.flatnonzero((target_C >= MIN_EXAMPLES) & (hit_C < MIN_RECALL * target_C)).tolist()
    counts = [f"{int(hit_C[label])} of {int(target_C[label])} of class {names[label]}" for label in overlooked]
    return [f"the model finds few held-out examples of some classes: {', '.join(counts)}"] if counts else []


def _regression(test: Mapping[str, Any]) -> list[str]:
    r2 = test.get("r2")
    return [] if r2 is None or r2 >= 0 else [f"R² is {r2:.4g}: the mean of the targets is a better prediction"]
