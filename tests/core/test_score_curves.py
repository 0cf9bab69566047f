"""Curves and calibration, against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from fedlearn.core.score_curves import brier_scores, precision_recall_curve, reliability_curve, roc_curve


def scored(seed, size=80, levels=None):
    """Return scores and truth. With few ``levels``, scores tie."""
    rng = np.random.default_rng(seed)
    positive = rng.random(size) < 0.3
    positive[:2] = [True, False]
    score = rng.normal(size=size) + positive
    return (np.round(score * levels) / levels if levels else score), positive


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_curves_equal_scikit_learn_also_with_ties(seed, levels):
    score, positive = scored(seed, levels=levels)
    roc, (x, y, _) = roc_curve(score, positive), sk.roc_curve(positive, score, drop_intermediate=False)
    assert np.allclose(roc.x_P, x)
    assert np.allclose(roc.y_P, y)
    curve, (precision, recall, _) = (
        precision_recall_curve(score, positive),
        sk.precision_recall_curve(positive, score, drop_intermediate=False),
    )
    assert np.allclose(curve.x_P, recall[::-1])
    assert np.allclose(curve.y_P, precision[::-1])


def test_a_thinned_curve_keeps_its_ends():
    score, positive = scored(1, size=500)
    curve = roc_curve(score, positive)
    thin = curve.thinned(20)
    assert len(thin.x_P) == 20
    assert (thin.x_P[0], thin.y_P[0], thin.x_P[-1], thin.y_P[-1]) == (0, 0, 1, 1)
    assert set(zip(thin.x_P, thin.y_P, strict=True)) <= set(zip(curve.x_P, curve.y_P, strict=True))
    assert curve.thinned(1000) is curve


def test_the_reliability_curve_equals_scikit_learn():
    rng = np.random.default_rng(3)
    probability = np.append(rng.random(200), [0.0, 0.1, 1.0])
    positive = rng.random(203) < probability
    observed, predicted = calibration_curve(positive, probability, n_bins=10)
    curve = reliability_curve(probability, positive)
    assert np.allclose(curve.observed_B, observed)
    assert np.allclose(curve.predicted_B, predicted)
    assert curve.count_B.sum() == 203
    by_hand = sum(curve.count_B * abs(observed - predicted)) / 203
    assert curve.expected_calibration_error == pytest.approx(by_hand)


def test_empty_bins_are_not_a_number_and_do_not_count():
    curve = reliability_curve(np.array([0.95, 0.95]), np.array([True, False]))
    assert np.isnan(curve.observed_B[:9]).all()
    assert curve.expected_calibration_error == pytest.approx(0.45)
    assert np.isnan(reliability_curve(np.zeros(0), np.zeros(0, bool)).expected_calibration_error)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_brier_scores_equal_scikit_learn(num_classes):
    rng = np.random.default_rng(4)
    probability = rng.dirichlet(np.ones(num_classes), size=50)
    target = rng.integers(0, num_classes, 50)
    score = brier_scores(probability, target).mean()
    if num_classes == 2:
        assert score == pytest.approx(sk.brier_score_loss(target, probability[:, 1]))
    else:
        assert score == pytest.approx(np.square(probability - np.eye(num_classes)[target]).sum(axis=1).mean())
