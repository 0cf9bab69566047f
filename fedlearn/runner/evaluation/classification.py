"""Judge a classification: confusion, classes, clinical figures, curves and calibration, as JSON values.

Shapes: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlearn.callbacks.run_history import finite_or_none
from fedlearn.core.intervals import RankedScores, wilson_interval
from fedlearn.core.score_curves import Curve, precision_recall_curve, reliability_curve, roc_curve
from fedlearn.core.tasks.classification import confusion_matrix
from fedlearn.data.preprocessing import Target
from fedlearn.runner.evaluation.held_out import HeldOut
from fedlearn.runner.evaluation.scores import MAX_CLASSES, confidences, json_estimate

MAX_CURVES = 10  # classes with curves
MAX_POINTS = 200  # points of a saved curve
THRESHOLD = 0.5
MAX_COUNT = 2.0**40  # largest count of examples in a cell


def classification_entries(held_out: HeldOut, target: Target) -> dict[str, Any]:
    """Return the entries of ``evaluation.json`` on a classification.

    Returns:
        - ``confusion``: counts (targets x predictions); absent for more than 20 classes.
        - ``classes``: counts and recall of each class; absent for more than 20 classes.
        - ``clinical``: see `clinical_figures`; for two classes only.
        - ``curves``: ROC, and precision and recall, of each class against the others; absent for more than 10 classes.
        - ``calibration``: reliability curve of the probabilities.
    """
    num_classes, target_N = len(target.classes), held_out.targets_N.astype(np.int64)
    entries: dict[str, Any] = {"calibration": _calibration(held_out, target)}
    if num_classes <= MAX_CLASSES:
        confusion_CC = confusion_matrix(held_out.outputs_NC, target_N)
        entries |= {"confusion": confusion_CC.tolist(), "classes": _classes(confusion_CC, target.classes)}
        if num_classes == 2:
            entries["clinical"] = clinical_figures(confusion_CC, target.classes)
    if num_classes <= MAX_CURVES:
        entries["curves"] = _curves(held_out, target)
    return entries


def entries_from_counts(confusion_CC: np.ndarray, target: Target) -> dict[str, Any]:
    """Return the entries that follow from confusion counts alone, which is all that real nodes send.

    The intervals are Wilson intervals of the counts. They do not cover noise that a node has added.
    """
    # a node can send any numbers
    confusion_CC = np.rint(np.clip(np.nan_to_num(confusion_CC), 0, MAX_COUNT)).astype(np.int64)
    hits, total = int(np.trace(confusion_CC)), int(confusion_CC.sum())
    entries: dict[str, Any] = {
        "examples": "held-out examples at the nodes",
        "num_examples": total,
        "metrics": {"accuracy": share_with_interval(hits, total)},
        "intervals": "Wilson intervals of the counts that nodes sent. They treat all examples as independent, and do "
        "not cover noise that a node has added.",
        "confusion": confusion_CC.tolist(),
    }
    if len(target.classes) == len(confusion_CC) and total:
        entries["classes"] = _classes(confusion_CC, target.classes)
        entries["constant"] = constant_class(confusion_CC.sum(axis=1), target.classes)
        if len(target.classes) == 2:
            entries["clinical"] = clinical_figures(confusion_CC, target.classes)
    return entries


def constant_class(count_C: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a model that always predicts the largest class.

    Args:
        count_C: held-out examples of each class, at least one in total.
        classes: names of the classes.
    """
    share = float(count_C.max() / count_C.sum())
    values = {"accuracy": share, "balanced_accuracy": 1 / np.count_nonzero(count_C), "auc": 0.5}
    if len(classes) == 2:
        values["auprc"] = float(count_C[1] / count_C.sum())
    return {"prediction": classes[int(count_C.argmax())], "metrics": values}


def clinical_figures(confusion_CC: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Return sensitivity, specificity, PPV and NPV at the threshold, with Wilson intervals.

    Args:
        confusion_CC: counts (targets x predictions); the second class is positive.
        classes: names of both classes.
    """
    (true_negatives, false_positives), (false_negatives, true_positives) = confusion_CC.tolist()
    shares = {
        "sensitivity": (true_positives, true_positives + false_negatives),
        "specificity": (true_negatives, true_negatives + false_positives),
        "ppv": (true_positives, true_positives + false_positives),
        "npv": (true_negatives, true_negatives + false_negatives),
    }
    figures = {name: share_with_interval(*counts) for name, counts in shares.items()}
    return {"positive_class": classes[1], "threshold": THRESHOLD, **figures}


def share_with_interval(part: int, whole: int) -> dict[str, Any]:
    """Return a share with its Wilson interval and both counts; without examples the share is None."""
    value = part / whole if whole else float("nan")
    return json_estimate(value, wilson_interval(part, whole), part=part, whole=whole)


def _classes(confusion_CC: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    target_C, predicted_C, hit_C = confusion_CC.sum(axis=1), confusion_CC.sum(axis=0), np.diag(confusion_CC)
    counts = zip(classes, target_C.tolist(), predicted_C.tolist(), hit_C.tolist(), strict=True)
    return [
        {
            "name": name,
            "num_examples": num_targets,
            "num_predicted": num_predicted,
            "recall": share_with_interval(num_hits, num_targets),
            "precision": share_with_interval(num_hits, num_predicted),
        }
        for name, num_targets, num_predicted, num_hits in counts
    ]


def _curves(held_out: HeldOut, target: Target) -> list[dict[str, Any]]:
    target_N, probability_NC = held_out.targets_N.astype(np.int64), target.probabilities(held_out.outputs_NC)
    entries = []
    for label in [1] if len(target.classes) == 2 else range(len(target.classes)):
        positive_N = target_N == label
        if 0 < positive_N.sum() < len(positive_N):
            # for two classes, the logit stays distinct where the probability is rounded to 1
            is_logit = held_out.outputs_NC.shape[1] == 1
            score_N = held_out.outputs_NC[:, 0] if is_logit else probability_NC[:, label]
            entries.append(_curve_entry(target.classes[label], score_N, positive_N))
    return entries


def _curve_entry(name: str, score_N: np.ndarray, positive_N: np.ndarray) -> dict[str, Any]:
    auc_1, auprc_1 = RankedScores(score_N, positive_N).areas(np.ones((1, len(score_N))))
    return {
        "class": name,
        "num_examples": int(positive_N.sum()),
        "prevalence": float(positive_N.mean()),
        "auc": float(auc_1[0]),
        "average_precision": float(auprc_1[0]),
        "roc": _points(roc_curve(score_N, positive_N)),
        "precision_recall": _points(precision_recall_curve(score_N, positive_N)),
    }


def _points(curve: Curve) -> dict[str, list[float]]:
    thin = curve.thinned(MAX_POINTS)
    return {"x": np.round(thin.x_P, 6).tolist(), "y": np.round(thin.y_P, 6).tolist()}


def _calibration(held_out: HeldOut, target: Target) -> dict[str, Any]:
    probability_NC, target_N = target.probabilities(held_out.outputs_NC), held_out.targets_N.astype(np.int64)
    predicted_N = target.class_numbers(held_out.outputs_NC)
    reliability = reliability_curve(*confidences(probability_NC, predicted_N, target_N))
    is_binary = len(target.classes) == 2
    return {
        "event": target.classes[1] if is_binary else "the predicted class is correct",
        "edges": reliability.edge_E.tolist(),
        "num_examples": reliability.count_B.tolist(),
        "predicted": [finite_or_none(value) for value in reliability.predicted_B],
        "observed": [finite_or_none(value) for value in reliability.observed_B],
    }
