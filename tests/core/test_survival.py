import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.core.metrics import combine_evaluations, evaluate, evaluate_client
from fedlearn.core.records import Predictions
from fedlearn.core.tasks import survival
from fedlearn.errors import DataError


def patients(client, seed, size=12):
    rng = np.random.default_rng((seed, client))
    targets = np.stack([rng.integers(1, 6, size), rng.integers(0, 2, size)], axis=1).astype(np.float32)
    outputs = np.round(rng.normal(size=(size, 1)) * 2) / 2
    return Predictions(client=client, outputs=outputs, targets=targets)


def efron(score, time, event):
    """Return the negative log partial likelihood, by the definition."""
    total = 0.0
    for moment in set(time[event == 1]):
        died = [i for i in range(len(time)) if time[i] == moment and event[i]]
        risk = sum(math.exp(score[i]) for i in range(len(time)) if time[i] >= moment)
        tied = sum(math.exp(score[i]) for i in died)
        total -= sum(score[i] for i in died)
        total += sum(math.log(risk - place / len(died) * tied) for place in range(len(died)))
    return total


def harrell(score, time, event):
    """Return the C-index, by the definition."""
    merit = pairs = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs, merit = pairs + 1, merit + (score[i] > score[j]) + 0.5 * (score[i] == score[j])
    return merit / pairs if pairs else math.nan


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 14), min_size=1, max_size=4), st.integers(1, 60))
def test_loss_and_c_index_follow_their_definitions_in_blocks_of_any_size(seed, sizes, max_pairs):
    parts = [patients(client, seed, size) for client, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survival, "MAX_PAIRS", max_pairs)
        found = evaluate(parts, task="survival")
    losses = [efron(p.outputs[:, 0], *p.targets.T) for p in parts]
    for k, part in enumerate(parts):
        if len(part.targets):
            assert found.per_client["loss"][k] == pytest.approx(losses[k] / len(part.targets))
            expected = harrell(part.outputs[:, 0], *part.targets.T)
            assert found.per_client["c_index"][k] == pytest.approx(expected, nan_ok=True)
    if sum(sizes):
        assert found.pooled["loss"] == pytest.approx(sum(losses) / sum(sizes))
        whole = [
            np.concatenate(arrays) for arrays in zip(*((p.outputs[:, 0], *p.targets.T) for p in parts), strict=True)
        ]
        assert found.pooled["c_index"] == pytest.approx(harrell(*whole), nan_ok=True)


def test_nodes_send_no_sums_and_give_the_same_loss():
    parts = [patients(client, 7) for client in range(3)]
    shown = [evaluate_client(part, task="survival") for part in parts]
    found, expected = combine_evaluations(shown, task="survival"), evaluate(parts, task="survival")
    assert [part.sums for part in shown] == [{}] * 3
    assert found.pooled["loss"] == pytest.approx(expected.pooled["loss"], rel=1e-12)
    assert math.isnan(found.pooled["c_index"])
    np.testing.assert_array_equal(found.per_client["c_index"], expected.per_client["c_index"])


@pytest.mark.parametrize("y", [[[-1, 1]], [[np.nan, 1]], [[np.inf, 0]], [[1, 2]], [[1, 0.5]], [1, 0], [[1, 0, 1]]])
def test_targets_that_are_no_times_and_events_are_refused(y):
    with pytest.raises(DataError, match="y has"):
        survival.SURVIVAL.targets(np.array(y, float))
