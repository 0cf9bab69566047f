"""Define the tasks with one class per position: ``segmentation`` and ``token_classification``.

- ``segmentation``: targets ``(N, H, W)``, outputs ``(N, C, H, W)``, one class per pixel
- ``token_classification``: targets ``(N, T)``, outputs ``(N, T, C)``, one class per token

A target of -1 is padding: it counts neither in the loss nor in a metric. The loss of an example is the mean over its
positions. An example without a position has the loss 0.

Shapes: N examples, C classes, P positions of an example.

References: L. R. Dice, *Measures of the Amount of Ecologic Association Between Species*, Ecology, 1945.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from fedlearn.core.metric import Metric, Sums
from fedlearn.core.segments import Counts
from fedlearn.core.tasks.base import Task, output_per_class
from fedlearn.core.tasks.classification import (
    accuracy,
    count_class_numbers,
    log_softmax,
    macro_score,
    mean_loss,
    softmax,
)
from fedlearn.errors import DataError, require

PADDING = -1  # target of a position without a class


def position_targets(y: np.ndarray, *, task: str, num_axes: int, example: str) -> np.ndarray:
    """Return class numbers of positions as int64.

    Args:
        y: class numbers from 0, and -1 for padding.
        task: name of the task, for messages.
        num_axes: number of axes of the targets.
        example: shape of the targets, for messages.

    Raises:
        DataError: a value is neither the number of a class nor -1, or the number of axes is wrong.
    """
    if y.ndim != num_axes:
        raise DataError(f"y has shape {y.shape}, expected {example}: one class for each position")
    classes = y.astype(np.int64)
    if not np.array_equal(classes, y) or classes.min(initial=0) < PADDING:
        raise DataError(f"y has other values than the class numbers of a {task} task (0, 1, ..., or -1 for padding)")
    return classes


def _positions(outputs: np.ndarray, targets: np.ndarray, class_axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return outputs ``(N, P, C)`` and targets ``(N, P)``."""
    num_classes, num_examples = outputs.shape[class_axis], len(outputs)
    if targets.max(initial=0) >= num_classes:
        raise DataError(f"a target is out of range: {targets.max()}, but the model has {num_classes} classes")
    num_positions = int(np.prod(targets.shape[1:]))
    last = np.moveaxis(outputs, class_axis, -1).reshape(num_examples, num_positions, num_classes)
    return last, targets.reshape(num_examples, num_positions).astype(np.int64)


def _loss_sums(outputs: np.ndarray, targets: np.ndarray, *, class_axis: int) -> Sums:
    outputs_NPC, targets_NP = _positions(outputs, targets, class_axis)
    is_real_NP = targets_NP != PADDING
    if not outputs_NPC.size:
        return {"loss": np.zeros(len(outputs))}
    log_p_NPC = log_softmax(outputs_NPC.reshape(-1, outputs_NPC.shape[2])).reshape(outputs_NPC.shape)
    loss_NP = -np.take_along_axis(log_p_NPC, np.maximum(targets_NP, 0)[..., None], axis=2)[..., 0]
    total_N = np.where(is_real_NP, loss_NP, 0.0).sum(axis=1)
    return {"loss": total_N / np.maximum(is_real_NP.sum(axis=1), 1)}


def _confusion_sums(outputs: np.ndarray, targets: np.ndarray, *, class_axis: int) -> Sums:
    """Return the cell of each position in the confusion matrix, targets x predictions."""
    outputs_NPC, targets_NP = _positions(outputs, targets, class_axis)
    num_classes = outputs_NPC.shape[2]
    cells_NP = targets_NP * num_classes + outputs_NPC.argmax(axis=2)
    return {"confusion": Counts(np.where(targets_NP == PADDING, -1, cells_NP), (num_classes, num_classes))}


def _overlap(totals: Mapping[str, np.ndarray], *, score: str) -> np.ndarray:
    """Return the mean Dice or IoU of the classes from 1 that occur in targets or predictions; NaN without such a class.

    Class 0 is the background.
    """
    confusion = totals["confusion"]
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)[..., 1:]
    whole = (confusion.sum(axis=-1) + confusion.sum(axis=-2))[..., 1:]
    values = 2 * hit / np.maximum(whole, 1) if score == "dice" else hit / np.maximum(whole - hit, 1)
    return np.asarray(values.sum(axis=-1) / (whole > 0).sum(axis=-1))


def _metrics(class_axis: int, *others: tuple[str, Callable[..., np.ndarray]]) -> tuple[Metric, ...]:
    loss = Metric(
        name="loss", sums=partial(_loss_sums, class_axis=class_axis), finish=mean_loss, higher_is_better=False
    )
    sums = partial(_confusion_sums, class_axis=class_axis)  # one object, so that the metrics share the sums
    return (loss, *(Metric(name=name, sums=sums, finish=finish) for name, finish in others))


def _softmax_first(outputs: np.ndarray) -> np.ndarray:
    return softmax(outputs, axis=1)


def _softmax_last(outputs: np.ndarray) -> np.ndarray:
    return softmax(outputs, axis=-1)


def _decide(outputs: np.ndarray, threshold: float, *, class_axis: int) -> np.ndarray:
    return np.asarray(outputs.argmax(axis=class_axis))


def _example_image(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, num_classes, 1, 1)), np.zeros((1, 1, 1), np.int64)


def _example_sequence(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, 1, num_classes)), np.zeros((1, 1), np.int64)


SEGMENTATION = Task(
    name="segmentation",
    metrics=_metrics(
        1,
        ("dice", partial(_overlap, score="dice")),
        ("iou", partial(_overlap, score="iou")),
        ("accuracy", accuracy),
    ),
    main_metric="dice",
    targets=partial(position_targets, task="segmentation", num_axes=3, example="(N, H, W)"),
    count_classes=count_class_numbers,
    num_outputs=output_per_class,
    has_classes=True,
    probabilities=_softmax_first,
    decide=partial(_decide, class_axis=1),
    class_axis=1,
    example=_example_image,
)
TOKEN_CLASSIFICATION = Task(
    name="token_classification",
    metrics=_metrics(-1, ("accuracy", accuracy), ("f1", partial(macro_score, score="f1"))),
    main_metric="f1",
    targets=partial(position_targets, task="token_classification", num_axes=2, example="(N, T)"),
    count_classes=count_class_numbers,
    num_outputs=output_per_class,
    has_classes=True,
    probabilities=_softmax_last,
    decide=partial(_decide, class_axis=-1),
    example=_example_sequence,
)


def entity_f1(tags: Sequence[str]) -> Metric:
    """Return the F1 of whole entities, for ``token_classification`` with tags such as ``B-PER``, ``I-PER`` and ``O``.

    An entity is correct if its first token, its last token and its kind are correct. A tag ``I-`` without an entity of
    its kind before it starts an entity, as in the evaluation of CoNLL-2000.

    Args:
        tags: names of the classes in the order of their numbers.

    Raises:
        SettingError: no tag starts with ``B-`` or ``I-``.

    Reference: L. A. Ramshaw, M. P. Marcus, *Text Chunking using Transformation-Based Learning*, 1995.
    """
    require(has_entities(tags), "tags", ", ".join(tags), "tags such as B-PER, I-PER and O", "the metric f1")
    kinds = sorted({tag[2:] for tag in tags if tag[:2] in ("B-", "I-")})
    kind_C = np.array([kinds.index(tag[2:]) if tag[:2] in ("B-", "I-") else -1 for tag in tags])
    begins_C = np.array([tag.startswith("B-") for tag in tags])

    def starts(tags_NT: np.ndarray, kind_NT: np.ndarray) -> np.ndarray:
        before_NT = np.pad(kind_NT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        return (kind_NT >= 0) & (begins_C[tags_NT] | (kind_NT != before_NT))

    def ends(start_NT: np.ndarray, kind_NT: np.ndarray) -> np.ndarray:
        after_NT = np.pad(kind_NT, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
        next_NT = np.pad(start_NT, ((0, 0), (0, 1)), constant_values=False)[:, 1:]
        return (kind_NT >= 0) & (next_NT | (after_NT != kind_NT))

    def entities(tags_NT: np.ndarray, is_real_NT: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the kind, the start, and the end of each entity at its last token; -1 elsewhere."""
        kind_NT = np.where(is_real_NT, kind_C[tags_NT], -1)
        start_NT = starts(tags_NT, kind_NT)
        first_NT = np.maximum.accumulate(np.where(start_NT, np.arange(tags_NT.shape[1]), -1), axis=1)
        is_end_NT = ends(start_NT, kind_NT)
        return np.where(is_end_NT, kind_NT, -1), np.where(is_end_NT, first_NT, -1)

    def sums(outputs_NTC: np.ndarray, targets_NT: np.ndarray) -> Sums:
        is_real_NT = targets_NT != PADDING
        kind_NT, first_NT = entities(np.maximum(targets_NT, 0).astype(np.int64), is_real_NT)
        found_NT, start_NT = entities(outputs_NTC.argmax(axis=2), is_real_NT)
        hit_NT = (kind_NT >= 0) & (kind_NT == found_NT) & (first_NT == start_NT)
        parts = {"hits": hit_NT, "targets": kind_NT >= 0, "predicted": found_NT >= 0}
        return {name: part.sum(axis=1).astype(np.float64) for name, part in parts.items()}

    def finish(totals: Mapping[str, np.ndarray]) -> np.ndarray:
        whole = totals["targets"] + totals["predicted"]
        return np.where(whole > 0, 2 * totals["hits"] / np.maximum(whole, 1), np.nan)

    return Metric(name="entity_f1", sums=sums, finish=finish)


def has_entities(tags: Sequence[str]) -> bool:
    """Return whether tags mark entities: some start with ``B-`` or ``I-``, and all others are ``O``."""
    return any(tag[:2] in ("B-", "I-") for tag in tags) and all(tag[:2] in ("B-", "I-") or tag == "O" for tag in tags)
