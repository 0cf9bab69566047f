from __future__ import annotations

import numpy as np
import pytest

from fedlearn.privacy.audit import LENGTH, Canaries, Ear, Scores, examine, flip, is_gaussian
from fedlearn.privacy.ledger import Event, Ledger
from fedlearn.records import Updates

DELTA = 1e-5
TRUE = {0.5: 9.997256, 1.0: 4.377178, 2.0: 1.993091}  # epsilon of one Gaussian release at DELTA


def scores(std: float, *, count: int = 1000, seed: int = 1) -> Scores:
    """Of canaries in a sum with noise of this multiplier."""
    rng = np.random.default_rng(seed)
    included = rng.integers(2, size=count).astype(bool)
    seen = included + std * rng.standard_normal(count)
    return Scores(included=seen[included], excluded=seen[~included])


@pytest.mark.parametrize("std", TRUE)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_bound_on_a_gaussian_release_is_below_its_epsilon_and_above_nothing(std, seed):
    found = examine(scores(std, seed=seed), delta=DELTA, gaussian=True)
    assert 0.05 * TRUE[std] < found.bound <= TRUE[std]


@pytest.mark.parametrize("std", TRUE)
def test_the_bound_that_assumes_no_law_is_below_the_one_that_does(std):
    general, gaussian = (examine(scores(std), delta=DELTA, gaussian=law) for law in (False, True))
    assert 0 < general.bound < gaussian.bound


def test_without_noise_the_bound_is_the_largest_that_so_many_canaries_can_give():
    found = examine(scores(0.0), delta=DELTA, gaussian=True)
    assert found.bound == pytest.approx(found.most)
    assert found.bound > 6
    assert (found.auc, found.tpr) == (1.0, 1.0)


def test_noise_a_fifth_of_what_is_claimed_is_found_out():
    assert examine(scores(0.2), delta=DELTA, gaussian=True).bound > TRUE[1.0]


def test_scores_that_tell_nothing_prove_nothing():
    rng = np.random.default_rng(1)
    blind = Scores(included=rng.standard_normal(500), excluded=rng.standard_normal(500))
    assert examine(blind, delta=DELTA, gaussian=True).bound < 0.3


def test_coins_are_fair_and_no_two_canaries_push_the_same_parameter():
    canaries = flip(1000, 1200, seed=1)
    assert len(set(canaries.place_M.tolist())) == 1000
    assert canaries.place_M.max() < 1200
    assert 430 < canaries.included_M.sum() < 570
    assert (canaries.included_M != flip(1000, 1200, seed=2).included_M).any()


def test_a_canary_that_is_out_stays_away_or_where_replacement_is_claimed_pushes_back():
    included = np.array([True, False, True])
    away = Canaries(included_M=included, place_M=np.arange(3))
    opposed = Canaries(included_M=included, place_M=np.arange(3), opposed=True)
    assert away.present.tolist() == [0, 2]
    assert opposed.present.tolist() == [0, 1, 2]
    assert opposed.push_M.tolist() == [1, -1, 1]


def test_an_ear_adds_up_what_each_client_sent_at_its_own_parameter():
    ear = Ear(Canaries(included_M=np.array([True, True]), place_M=np.array([2, 0])))
    sent = np.array([[1.0, 2.0, LENGTH], [5.0, 6.0, 7.0]], np.float32)
    ones = np.ones(2, np.int64)
    for _ in range(2):
        ear(Updates(clients_K=np.array([0, 1]), delta_KD=sent, num_examples_K=ones, num_steps_K=ones))
    assert ear.heard_M.tolist() == [2 * LENGTH, 10.0]


def test_the_gaussian_law_is_assumed_only_where_nothing_was_sampled():
    assert is_gaussian(Ledger().charged(Event(1.0), 3).charged_clients({1: (Event(2.0), 1)}))
    assert not is_gaussian(Ledger().charged(Event(1.0), 3).charged(Event(1.0, "poisson", 0.1)))
    assert not is_gaussian(Ledger().charged_clients({4: (Event(1.0, "poisson", 0.5), 2)}))
