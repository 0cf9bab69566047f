"""Confidence intervals: Wilson's interval against SciPy, the bootstrap against its law and its coverage."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from fedlearn.core.intervals import RankedScores, bootstrap_of, interval_of, wilson_interval


@pytest.mark.parametrize(("part", "whole"), [(0, 7), (7, 7), (3, 11), (480, 500)])
def test_wilson_interval_equals_scipy(part, whole):
    expected = binomtest(part, whole).proportion_ci(method="wilson")
    assert wilson_interval(part, whole) == pytest.approx((expected.low, expected.high))


def test_a_share_of_nothing_has_no_interval():
    assert np.isnan(wilson_interval(0, 0)).all()


@pytest.mark.parametrize("seed", range(3))
def test_weighted_areas_equal_scikit_learn_with_ties(seed):
    rng = np.random.default_rng(seed)
    score, positive = np.round(rng.normal(size=60), 1), rng.random(60) < 0.4
    weight_RN = rng.integers(0, 4, (5, 60)).astype(float)
    auc_R, precision_R = RankedScores(score, positive).areas(weight_RN)
    for weight, auc, precision in zip(weight_RN, auc_R, precision_R, strict=True):
        assert auc == pytest.approx(sk.roc_auc_score(positive, score, sample_weight=weight))
        assert precision == pytest.approx(sk.average_precision_score(positive, score, sample_weight=weight))


def test_areas_without_one_kind_of_examples_are_undefined():
    auc, precision = RankedScores(np.arange(3.0), np.array([True, False, False])).areas(np.array([[0.0, 1, 1]]))
    assert np.isnan(auc[0])
    assert np.isnan(precision[0])


def drawn(bootstrap, seed=0):
    return np.concatenate(list(bootstrap.weights(np.random.default_rng(seed))))


def test_few_clients_keep_their_numbers_of_examples_in_each_replicate():
    bootstrap = bootstrap_of(np.array([0, 0, 0, 1, 1]))
    weight_RU = drawn(bootstrap)
    assert weight_RU.shape == (1000, 5)
    assert (weight_RU[:, :3].sum(axis=1) == 3).all()
    assert (weight_RU[:, 3:].sum(axis=1) == 2).all()
    assert weight_RU.mean(axis=0) == pytest.approx(np.ones(5), abs=0.12)
    assert "within each client" in bootstrap.method
    assert "2 clients" in bootstrap.method


def test_ten_clients_are_drawn_as_a_whole():
    client_N = np.repeat(np.arange(10), 3)
    bootstrap = bootstrap_of(client_N)
    assert drawn(bootstrap).shape == (1000, 10)
    assert "over clients" in bootstrap.method
    assert np.array_equal(bootstrap.unit_sums(np.ones((30, 1)))[:, 0], np.full(10, 3))


def test_positions_of_a_sequence_are_drawn_together():
    bootstrap = bootstrap_of(np.array([0, 0, 0, 0, 1]), np.array([0, 0, 1, 1, 2]))
    assert drawn(bootstrap).shape == (1000, 3)
    assert np.array_equal(bootstrap.unit_sums(np.arange(5.0)[:, None])[:, 0], [1, 5, 4])


def test_the_interval_of_a_mean_has_the_width_of_the_normal_law():
    value_N = np.random.default_rng(1).normal(size=400)
    weight_RU = drawn(bootstrap_of(np.zeros(400, int)))
    low, high = interval_of(weight_RU @ value_N / 400)
    assert high - low == pytest.approx(2 * 1.96 * value_N.std() / 20, rel=0.1)


def test_clients_with_different_means_widen_the_interval():
    rng = np.random.default_rng(2)
    client_N = np.repeat(np.arange(20), 30)
    value_N = rng.normal(size=20)[client_N] + 0.1 * rng.normal(size=600)
    bootstrap = bootstrap_of(client_N)
    low, high = interval_of((drawn(bootstrap) @ bootstrap.unit_sums(value_N[:, None]))[:, 0] / 600)
    expected = 2 * 1.96 * np.std([value_N[client_N == k].mean() for k in range(20)]) / np.sqrt(20)
    assert high - low == pytest.approx(expected, rel=0.2)


def test_undefined_replicates_are_left_out():
    assert interval_of(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert np.isnan(interval_of(np.array([np.nan]))).all()
