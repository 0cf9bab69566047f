import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fedlearn.core.metrics import combine_evaluations, evaluate, evaluate_client, higher_is_better, main_metric
from fedlearn.core.records import Predictions
from fedlearn.core.tasks import TASKS

METRICS = {name: TASKS[name].metric_names for name in ("binary", "multiclass", "regression", "ranking")}


def client(number, outputs, targets):
    return Predictions(client=number, outputs=np.asarray(outputs, np.float32), targets=np.asarray(targets))


def binary_client(number, seed, size=40):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, size)
    return client(number, (targets + rng.normal(size=size))[:, None] - 0.5, targets)


def multiclass_client(number, seed, size=60, classes=4):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, size)
    return client(number, np.eye(classes)[targets] + rng.normal(size=(size, classes)), targets)


def test_binary_metrics_of_four_examples_are_those_worked_out_by_hand():
    pooled = evaluate([client(0, [[2.0], [-1.0], [1.0], [-3.0]], [1, 1, 0, 0])], task="binary").pooled
    losses = [math.log(1 + math.exp(z)) for z in (-2, 1, 1, -3)]
    assert pooled == pytest.approx(
        {"loss": sum(losses) / 4, "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5}
        | {"auc": 0.75, "auprc": (1 + 2 / 3) / 2}
    )


def test_regression_metrics_of_three_examples_are_those_worked_out_by_hand():
    pooled = evaluate([client(0, [[1.0], [2.0], [6.0]], [1.0, 4.0, 4.0])], task="regression").pooled
    assert pooled == pytest.approx({"loss": 8 / 3, "rmse": math.sqrt(8 / 3), "mae": 4 / 3, "r2": 1 - 8 / 6})


def test_binary_metrics_agree_with_scikit_learn():
    part = binary_client(0, seed=1)
    pooled, logits, y = evaluate([part], task="binary").pooled, part.outputs[:, 0], part.targets
    chance = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert pooled["loss"] == pytest.approx(sk.log_loss(y, chance))
    assert pooled["accuracy"] == pytest.approx(sk.accuracy_score(y, logits > 0))
    assert pooled["auc"] == pytest.approx(sk.roc_auc_score(y, chance))
    assert pooled["auprc"] == pytest.approx(sk.average_precision_score(y, chance))
    assert pooled["f1"] == pytest.approx(sk.f1_score(y, logits > 0))


def test_multiclass_metrics_agree_with_scikit_learn():
    part = multiclass_client(0, seed=2)
    pooled, y = evaluate([part], task="multiclass").pooled, part.targets
    chance = np.exp(part.outputs.astype(np.float64))
    chance /= chance.sum(axis=1, keepdims=True)
    predicted = part.outputs.argmax(axis=1)
    assert pooled["loss"] == pytest.approx(sk.log_loss(y, chance))
    assert pooled["auc"] == pytest.approx(sk.roc_auc_score(y, chance, multi_class="ovr", average="macro"))
    assert pooled["precision"] == pytest.approx(sk.precision_score(y, predicted, average="macro"))
    assert pooled["recall"] == pytest.approx(sk.recall_score(y, predicted, average="macro"))
    assert pooled["f1"] == pytest.approx(sk.f1_score(y, predicted, average="macro"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
def test_auc_with_ties_agrees_with_scikit_learn(examples):
    y = np.array([int(positive) for positive, _ in examples])
    logits = np.array([[float(score)] for _, score in examples])
    evaluation = evaluate([client(0, logits, y)], task="binary")
    for auc in (evaluation.pooled["auc"], evaluation.per_client["auc"][0]):
        if len(set(y)) < 2:
            assert math.isnan(auc)
        else:
            assert auc == pytest.approx(sk.roc_auc_score(y, logits[:, 0]))


def test_pooled_is_all_examples_together_and_not_the_mean_over_clients():
    few, many = client(0, [[1.0]], [0]), client(1, [[1.0]] * 9, [1] * 9)
    seen = evaluate([few, many], task="binary")
    assert seen.pooled["accuracy"] == pytest.approx(0.9)
    assert seen.mean("accuracy") == pytest.approx(0.5)


def test_a_separate_pooled_set_replaces_the_union_and_leaves_clients_alone():
    part = binary_client(3, seed=0)
    seen = evaluate([part], task="binary", pooled=client(-1, [[1.0], [1.0]], [1, 0]))
    assert seen.pooled["accuracy"] == 0.5
    assert seen.per_client["accuracy"][0] == evaluate([part], task="binary").pooled["accuracy"]


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)))
def test_the_order_of_clients_does_not_matter(order):
    parts = [multiclass_client(k, seed=k) for k in range(5)]
    expected = evaluate(parts, task="multiclass")
    seen = evaluate([parts[k] for k in order], task="multiclass")
    assert seen.clients == (0, 1, 2, 3, 4)
    assert seen.pooled == expected.pooled
    for metric in METRICS["multiclass"]:
        np.testing.assert_array_equal(seen.per_client[metric], expected.per_client[metric])


@pytest.mark.parametrize("task", METRICS)
def test_names_and_order_of_metrics_are_the_same_everywhere(task):
    columns = 2 if task == "multiclass" else 1
    seen = evaluate([client(0, np.eye(2)[:, :columns], [1, 0]), client(1, np.zeros((0, columns)), [])], task=task)
    assert tuple(seen.pooled) == tuple(seen.per_client) == METRICS[task]
    assert main_metric(task) in METRICS[task]


@pytest.mark.parametrize("task", METRICS)
def test_nothing_to_judge_and_diverged_models_give_nan_without_a_warning(task):
    diverged = client(1, [[np.nan], [1.0]], [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = evaluate([client(0, np.zeros((0, 1)), []), diverged], task=task)
        nobody = evaluate([], task=task)
    for metric in METRICS[task]:
        assert np.isnan(seen.per_client[metric]).all()
        assert math.isnan(seen.pooled[metric])
        assert math.isnan(nobody.pooled[metric])
    assert seen.num_examples_K.tolist() == [0, 2]


def test_one_class_or_one_example_leaves_only_the_undefined_out_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_class = evaluate([client(0, [[1.0], [-1.0]], [0, 0])], task="binary").pooled
        same_class = evaluate([client(0, [[1.0, 0.0, 0.0]] * 2, [0, 0])], task="multiclass").pooled
        one_example = evaluate([client(0, [[1.0]], [3.0])], task="regression").pooled
        constant = evaluate([client(0, [[1.0], [2.0]], [3.0, 3.0])], task="regression").pooled
    assert math.isnan(one_class["auc"])
    assert math.isnan(one_class["auprc"])
    assert one_class["accuracy"] == 0.5
    assert one_class["precision"] == one_class["recall"] == 0.0
    assert math.isnan(same_class["auc"])
    assert same_class["accuracy"] == 1.0
    assert math.isnan(one_example["r2"])
    assert one_example["rmse"] == 2.0
    assert math.isnan(constant["r2"])


def test_a_client_that_lacks_classes_still_has_an_auc_over_those_it_holds():
    part = client(0, [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.5, 1.0, 0.0]], [0, 1, 0])
    assert evaluate([part], task="multiclass").pooled["auc"] == 1.0


def test_examples_that_tie_share_their_precision():
    pooled = evaluate([client(0, [[1.0], [1.0], [0.0], [1.0]], [1, 0, 1, 0])], task="binary").pooled
    assert pooled["auprc"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert pooled["auprc"] == pytest.approx(sk.average_precision_score([1, 0, 1, 0], [1, 1, 0, 1]))


def test_huge_logits_neither_overflow_nor_tie():
    loss = evaluate([client(0, [[1e4], [-1e4]], [0, 1])], task="binary").pooled["loss"]
    assert loss == pytest.approx(1e4)
    sure = client(0, [[60.0, 0.0], [50.0, 0.0], [40.0, 0.0]], [0, 0, 1])
    pooled = evaluate([sure], task="multiclass").pooled
    assert pooled["auc"] == 1.0
    assert pooled["loss"] == pytest.approx(40 / 3)


def test_losses_and_errors_are_better_when_lower():
    assert [higher_is_better(m) for m in ("loss", "rmse", "mae")] == [False] * 3
    assert all(higher_is_better(m) for m in ("accuracy", "auc", "precision", "recall", "f1", "r2"))


def regression_client(number, seed, size=20):
    rng = np.random.default_rng(seed)
    targets = rng.normal(3, 2, size).astype(np.float32)
    return client(number, (targets + rng.normal(size=size))[:, None], targets)


MAKERS = {"binary": binary_client, "multiclass": multiclass_client, "regression": regression_client}


@pytest.mark.parametrize("task", MAKERS)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5))
@settings(deadline=None, max_examples=25)
def test_sums_over_clients_give_the_evaluation_of_all_their_outputs_but_the_pooled_areas(task, seed, sizes):
    parts = [MAKERS[task](number, seed + number, size) for number, size in enumerate(sizes)]
    whole = evaluate(parts, task=task)
    summed = combine_evaluations([evaluate_client(part, task=task) for part in reversed(parts)], task=task)
    for metric in METRICS[task]:
        assert np.array_equal(summed.per_client[metric], whole.per_client[metric], equal_nan=True)
        if metric in ("auc", "auprc"):
            assert math.isnan(summed.pooled[metric])
        else:
            assert summed.pooled[metric] == pytest.approx(whole.pooled[metric], rel=1e-9, abs=1e-9, nan_ok=True), metric
    assert (summed.clients, summed.num_examples_K.tolist()) == (whole.clients, whole.num_examples_K.tolist())


def test_a_tally_holds_no_output_and_no_target():
    part = binary_client(0, 1)
    shown = evaluate_client(part, task="binary")
    assert {name: np.shape(value) for name, value in shown.sums.items()} == {"loss": (), "confusion": (2, 2)}
    assert shown.sums["confusion"].sum() == shown.num_examples == 40


def sequences(client, targets_NT, seed):
    """Return random outputs for targets ``(N, T)``; -1 marks a position without a target."""
    rng = np.random.default_rng(seed)
    targets_NT = np.asarray(targets_NT)
    return Predictions(client=client, outputs=rng.normal(size=(*targets_NT.shape, 4)), targets=targets_NT)


def test_each_position_of_a_sequence_with_a_target_is_an_example():
    parts = [sequences(0, [[1, 2, -1], [0, -1, -1]], 0), sequences(1, [[3, 3, 1]], 1)]
    real = [part.targets >= 0 for part in parts]
    flat = [
        Predictions(client=part.client, outputs=part.outputs[at], targets=part.targets[at])
        for part, at in zip(parts, real, strict=True)
    ]
    found, expected = (evaluate(some, task="multiclass") for some in (parts, flat))
    assert found.pooled == expected.pooled
    assert found.num_examples_K.tolist() == [3, 3]
    assert evaluate_client(parts[0], task="multiclass").num_examples == 3


def ranked(client, place, others=99):
    """Return a ranking with the one example of target 1 at this place."""
    outputs = -np.arange(others + 1.0)[:, None]
    targets = np.zeros(others + 1, np.int64)
    targets[place - 1] = 1
    return Predictions(client=client, outputs=outputs, targets=targets)


def test_a_ranking_counts_the_first_ten_places():
    found = evaluate([ranked(0, 1), ranked(1, 10), ranked(2, 11)], task="ranking")
    assert found.per_client["hr@10"].tolist() == [1, 1, 0]
    np.testing.assert_allclose(found.per_client["ndcg@10"], [1, 1 / np.log2(11), 0])
    assert found.pooled["hr@10"] == pytest.approx(2 / 3)


def test_equal_outputs_are_no_merit_in_a_ranking():
    same = Predictions(client=0, outputs=np.zeros((100, 1)), targets=np.eye(100, dtype=np.int64)[0])
    assert evaluate([same], task="ranking").pooled["hr@10"] == 0


def test_a_client_without_a_list_has_no_place_in_a_ranking():
    parts = [ranked(0, 3), Predictions(client=1, outputs=np.zeros((0, 1)), targets=np.zeros(0, np.int64))]
    found = evaluate(parts, task="ranking")
    assert np.isnan(found.per_client["hr@10"][1])
    assert found.pooled["hr@10"] == 1


def test_sums_of_rankings_give_what_the_outputs_give():
    parts = [ranked(0, 1), ranked(1, 7), ranked(2, 40)]
    shown = combine_evaluations([evaluate_client(part, task="ranking") for part in parts], task="ranking")
    expected = evaluate(parts, task="ranking").pooled
    assert shown.pooled == pytest.approx(expected, abs=1e-9)


def client_of(number, seed, task):
    rng = np.random.default_rng((seed, number))
    size, columns = int(rng.integers(0, 9)), 4 if task == "multiclass" else 1
    outputs = np.round(rng.normal(size=(size, columns)) * 2) / 2  # with ties
    targets = rng.normal(size=size) if task == "regression" else rng.integers(0, max(columns, 2), size)
    if task == "ranking":
        targets = np.eye(max(size, 1), dtype=np.int64)[0][:size]
    return client(number, outputs * (np.nan if rng.random() < 0.1 else 1), targets)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(METRICS)))
@example(845, "binary")  # ties among the scores of a client
def test_a_client_has_the_same_bits_alone_and_among_others(seed, task):
    parts = [client_of(number, seed, task) for number in range(12)]
    together = evaluate(parts, task=task)
    for k, part in enumerate(parts):
        alone = evaluate([part], task=task)
        for metric in METRICS[task]:
            np.testing.assert_array_equal(together.per_client[metric][k], alone.per_client[metric][0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["binary", "multiclass"]))
def test_each_client_has_the_scores_of_scikit_learn(seed, task):
    parts = [
        part for part in (client_of(number, seed, task) for number in range(12)) if np.isfinite(part.outputs).all()
    ]
    together = evaluate(parts, task=task)
    average, functions = "binary" if task == "binary" else "macro", (sk.precision_score, sk.recall_score, sk.f1_score)
    for k, part in enumerate(parts):
        if not len(part.targets):
            continue
        predicted = part.outputs.argmax(axis=1) if task == "multiclass" else part.outputs[:, 0] > 0
        for name, score in zip(("precision", "recall", "f1"), functions, strict=True):
            expected = score(part.targets, predicted, average=average, zero_division=0.0)
            assert together.per_client[name][k] == pytest.approx(expected)
        if task == "binary" and len(set(part.targets)) == 2:
            expected = sk.average_precision_score(part.targets, part.outputs[:, 0])
            assert together.per_client["auprc"][k] == pytest.approx(expected)
            assert together.per_client["auc"][k] == pytest.approx(sk.roc_auc_score(part.targets, part.outputs[:, 0]))


def test_sums_of_a_multiclass_model_with_two_outputs_give_the_metrics_of_its_outputs():
    parts = [multiclass_client(number, seed=number, classes=2) for number in range(3)]
    sums = combine_evaluations([evaluate_client(part, task="multiclass") for part in parts], task="multiclass")
    expected = evaluate(parts, task="multiclass").pooled
    assert all(sums.pooled[name] == pytest.approx(expected[name]) for name in ("accuracy", "precision", "recall", "f1"))
