import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.core.metrics import combine_evaluations, evaluate, evaluate_client
from fedlearn.core.records import Predictions
from fedlearn.core.tasks import TASKS
from fedlearn.core.tasks.dense import entity_f1
from fedlearn.errors import DataError, SettingError

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def images(client, seed, size=4, num_classes=3):
    rng = np.random.default_rng((seed, client))
    targets = rng.integers(-1, num_classes, (size, 5, 4))
    return Predictions(client=client, outputs=rng.normal(size=(size, num_classes, 5, 4)), targets=targets)


def sentences(client, seed, size=4, length=8):
    rng = np.random.default_rng((seed, client))
    targets = rng.choice([0, 1, 2, 2, 3, 4], (size, length))
    for row in range(size):
        targets[row, rng.integers(1, length + 1) :] = -1
    outputs = np.eye(len(TAGS))[np.maximum(targets, 0)] + rng.normal(0, 0.6, (size, length, len(TAGS)))
    return Predictions(client=client, outputs=outputs, targets=targets)


def overlap(parts, score):
    """Return the mean Dice or IoU of the foreground classes, by the definition."""
    truth = np.concatenate([part.targets.ravel() for part in parts])
    predicted = np.concatenate([part.outputs.argmax(axis=1).ravel() for part in parts])
    truth, predicted = truth[truth >= 0], predicted[truth >= 0]
    values = []
    for number in (1, 2):
        a, b = truth == number, predicted == number
        if a.any() or b.any():
            whole = a.sum() + b.sum() if score == "dice" else (a | b).sum()
            values.append((2 if score == "dice" else 1) * (a & b).sum() / whole)
    return np.mean(values) if values else np.nan


def spans(tags):
    """Return (kind, first, last) of each entity, by a loop over the tags."""
    found, kind, first = set(), None, 0
    for number, tag in enumerate([*tags, "O"]):
        if kind is not None and (tag == "O" or tag.startswith("B-") or tag[2:] != kind):
            found.add((kind, first, number - 1))
            kind = None
        if kind is None and tag != "O":
            kind, first = tag[2:], number
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_dice_and_iou_follow_their_definitions(seed):
    parts = [images(client, seed) for client in range(3)]
    found = evaluate(parts, task="segmentation")
    sums = combine_evaluations([evaluate_client(part, task="segmentation") for part in parts], task="segmentation")
    for score in ("dice", "iou"):
        assert found.pooled[score] == pytest.approx(overlap(parts, score), nan_ok=True)
        assert found.per_client[score][1] == pytest.approx(overlap(parts[1:2], score), nan_ok=True)
        assert sums.pooled[score] == pytest.approx(found.pooled[score], nan_ok=True)
    assert sums.pooled["loss"] == pytest.approx(found.pooled["loss"])
    assert found.num_examples_K.tolist() == [4, 4, 4]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_scores_of_tokens_leave_out_padding(seed):
    task = TASKS["token_classification"].with_metrics([entity_f1(TAGS)])
    parts = [sentences(client, seed) for client in range(3)]
    found = evaluate(parts, task=task)
    hits = whole = right = total = 0
    for part in parts:
        for outputs, targets in zip(part.outputs, part.targets, strict=True):
            real = targets >= 0
            truth, predicted = targets[real], outputs.argmax(axis=1)[real]
            a, b = (spans([TAGS[number] for number in row]) for row in (truth, predicted))
            hits, whole = hits + 2 * len(a & b), whole + len(a) + len(b)
            right, total = right + (truth == predicted).sum(), total + real.sum()
    assert found.pooled["entity_f1"] == pytest.approx(hits / whole if whole else np.nan, nan_ok=True)
    assert found.pooled["accuracy"] == pytest.approx(right / total)
    sums = combine_evaluations([evaluate_client(part, task=task) for part in parts], task=task)
    assert sums.pooled == pytest.approx(found.pooled, nan_ok=True)


@pytest.mark.parametrize(("name", "shape"), [("segmentation", (2, 3, 3)), ("token_classification", (2, 3))])
def test_targets_of_positions_are_class_numbers_or_padding(name, shape):
    targets = TASKS[name].targets
    assert targets(np.full(shape, -1.0)).dtype == np.int64
    for wrong in (np.full(shape, -2), np.full(shape, 0.5), np.zeros(shape[:1])):
        with pytest.raises(DataError, match="y has"):
            targets(wrong)


def test_a_target_above_the_number_of_outputs_is_refused():
    part = images(0, 1)
    part.targets[0, 0, 0] = 3
    with pytest.raises(DataError, match="out of range"):
        evaluate([part], task="segmentation")


def test_tags_without_entities_are_refused():
    with pytest.raises(SettingError, match="tags"):
        entity_f1(["noun", "verb"])
