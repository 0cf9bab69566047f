from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.privacy.gradient_inversion_attack import (
    confidence,
    lira,
    pearson_correlation,
    reconstruct_inputs,
    reconstruct_labels,
    roc,
)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_the_input_of_an_affine_layer_comes_back_whatever_the_loss_and_however_the_gradient_is_scaled(seed, scale):
    rng = np.random.default_rng(seed)
    x_BF, d_BO = rng.standard_normal((4, 7)), rng.standard_normal((4, 3))
    recovered_BF = reconstruct_inputs(scale * d_BO[:, :, None] * x_BF[:, None, :], scale * d_BO)
    np.testing.assert_allclose(recovered_BF, x_BF, rtol=1e-9)


def test_the_label_is_where_the_gradient_of_the_last_bias_is_negative():
    rng = np.random.default_rng(1)
    y_B = rng.integers(10, size=50)
    logits_BC = rng.standard_normal((50, 10))
    softmax_BC = np.exp(logits_BC) / np.exp(logits_BC).sum(axis=1, keepdims=True)
    assert (reconstruct_labels(softmax_BC - np.eye(10)[y_B]) == y_B).all()


def test_correlation_is_one_for_itself_minus_one_for_its_negative_and_zero_for_a_constant():
    x_BF = np.random.default_rng(1).standard_normal((3, 20))
    np.testing.assert_allclose(pearson_correlation(x_BF, 2 * x_BF + 3), 1)
    np.testing.assert_allclose(pearson_correlation(x_BF, -x_BF), -1)
    np.testing.assert_allclose(pearson_correlation(x_BF, np.ones_like(x_BF)), 0, atol=1e-6)


def test_confidence_is_the_log_odds_of_the_true_class_and_survives_certainty():
    logits = np.array([[1.0, 2.0, 0.5], [1000.0, -1000.0, 0.0]])
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    seen = confidence(logits, np.array([1, 0]))
    assert seen[0] == pytest.approx(np.log(p[1] / (1 - p[1])))
    assert seen[1] == pytest.approx(1000.0)
    assert confidence(np.array([[3.0], [3.0]]), np.array([1, 0])).tolist() == [3.0, -3.0]


def confidences(strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences of 20 models on 200 examples of different difficulty.

    They are higher by ``strength`` for training examples.
    """
    rng = np.random.default_rng(1)
    member_MN = rng.random((20, 200)) < 0.5
    hardness_N = 5 * rng.standard_normal(200)
    return hardness_N + strength * member_MN + rng.standard_normal((20, 200)), member_MN


def test_the_likelihood_ratio_sees_members_where_examples_differ_more_than_membership_does():
    seen_MN, member_MN = confidences(2.0)
    assert roc(lira(seen_MN, member_MN), member_MN).auc > 0.85
    assert roc(seen_MN, member_MN).auc < 0.7


def test_where_nothing_is_remembered_members_cannot_be_told():
    seen_MN, member_MN = confidences(0.0)
    assert roc(lira(seen_MN, member_MN), member_MN).auc == pytest.approx(0.5, abs=0.03)


def test_an_example_that_all_shadows_or_none_were_trained_on_gets_no_score():
    seen_MN, member_MN = confidences(2.0)
    member_MN[:, 0], member_MN[:, 1] = True, False
    assert (lira(seen_MN, member_MN)[:, :2] == 0).all()


def test_tpr_is_read_off_at_the_last_threshold_that_keeps_the_fpr():
    curve = roc(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, True, False]))
    assert curve.tpr_at(0.0) == pytest.approx(1 / 3)
    assert curve.tpr_at(0.5) == pytest.approx(1.0)
    assert curve.auc == pytest.approx(4 / 6)
