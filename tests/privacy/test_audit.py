from __future__ import annotations

import numpy as np
import pytest

from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.privacy_ledger import EpsilonDeltaEvent, Event, LaplaceEvent, Ledger, RenyiEvent
from fedlearn.core.records import Updates
from fedlearn.privacy.audit import CANARY_NORM, Canaries, Observer, Scores, audit_scores, draw_canaries, is_gaussian

DELTA = 1e-5
TRUE = {0.5: 9.997256, 1.0: 4.377178, 2.0: 1.993091}  # epsilon of one Gaussian release at DELTA


def scores(std: float, *, count: int = 1000, seed: int = 1) -> Scores:
    """Return scores of canaries in a sum with Gaussian noise of standard deviation ``std``."""
    rng = np.random.default_rng(seed)
    included = rng.integers(2, size=count).astype(bool)
    seen = included + std * rng.standard_normal(count)
    return Scores(included=seen[included], excluded=seen[~included])


@pytest.mark.parametrize("std", TRUE)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_bound_on_a_gaussian_release_is_below_its_epsilon_and_above_nothing(std, seed):
    found = audit_scores(scores(std, seed=seed), delta=DELTA, gaussian=True)
    assert 0.05 * TRUE[std] < found.epsilon_lower_bound <= TRUE[std]


@pytest.mark.parametrize("std", TRUE)
def test_the_bound_that_assumes_no_law_is_below_the_one_that_does(std):
    general, gaussian = (audit_scores(scores(std), delta=DELTA, gaussian=law) for law in (False, True))
    assert 0 < general.epsilon_lower_bound < gaussian.epsilon_lower_bound


def test_without_noise_the_bound_is_the_largest_that_so_many_canaries_can_give():
    found = audit_scores(scores(0.0), delta=DELTA, gaussian=True)
    assert found.epsilon_lower_bound == pytest.approx(found.max_lower_bound)
    assert found.epsilon_lower_bound > 6
    assert (found.auc, found.tpr) == (1.0, 1.0)


def test_noise_a_fifth_of_what_is_claimed_is_found_out():
    assert audit_scores(scores(0.2), delta=DELTA, gaussian=True).epsilon_lower_bound > TRUE[1.0]


def test_scores_that_tell_nothing_prove_nothing():
    rng = np.random.default_rng(1)
    blind = Scores(included=rng.standard_normal(500), excluded=rng.standard_normal(500))
    assert audit_scores(blind, delta=DELTA, gaussian=True).epsilon_lower_bound < 0.3


def test_coins_are_fair_and_no_two_canaries_push_the_same_parameter():
    canaries = draw_canaries(1000, 1200, seed=1)
    assert len(set(canaries.index_M.tolist())) == 1000
    assert canaries.index_M.max() < 1200
    assert 430 < canaries.included_M.sum() < 570
    assert (canaries.included_M != draw_canaries(1000, 1200, seed=2).included_M).any()


def test_a_canary_that_is_out_stays_away_or_where_replacement_is_claimed_pushes_back():
    included = np.array([True, False, True])
    away = Canaries(included_M=included, index_M=np.arange(3))
    opposed = Canaries(included_M=included, index_M=np.arange(3), is_replacement=True)
    assert away.participants.tolist() == [0, 2]
    assert opposed.participants.tolist() == [0, 1, 2]
    assert opposed.sign_M.tolist() == [1, -1, 1]


def test_an_observer_adds_up_what_each_client_sent_at_its_own_parameter():
    observer = Observer(np.array([2, 0]))
    sent = np.array([[1.0, 2.0, CANARY_NORM], [5.0, 6.0, 7.0]], np.float32)
    ones = np.ones(2, np.int64)
    for _ in range(2):
        observer(Updates(clients_K=np.array([0, 1]), delta_KD=sent, num_examples_K=ones, num_steps_K=ones))
    assert observer.observed_M.tolist() == [2 * CANARY_NORM, 10.0]


def guarantee(**parts):
    texts = {"kind": "mine", "unit": "client", "adjacency": "one client more or less"}
    return PrivacyGuarantee(charge=lambda ledger, release: ledger, epsilon_of=lambda ledger: None, **texts, **parts)


def test_the_gaussian_law_is_assumed_only_where_nothing_was_sampled():
    some, known = guarantee(noise_multiplier=1.0), RenyiEvent((2.0,), (0.5,))
    assert is_gaussian(Ledger().charge_federation(Event(1.0), 3).charge_clients({1: (Event(2.0), 1)}), some)
    sampled = Ledger().charge_federation(Event(1.0), 3).charge_federation(Event(1.0, "poisson", 0.1))
    assert not is_gaussian(sampled, some)
    assert not is_gaussian(Ledger().charge_clients({4: (Event(1.0, "poisson", 0.5), 2)}), some)
    assert not is_gaussian(Ledger().charge_federation(LaplaceEvent(1.0)), some)
    assert not is_gaussian(Ledger().charge_federation(EpsilonDeltaEvent(1.0)), some)
    assert is_gaussian(Ledger().charge_federation(known), some)
    assert not is_gaussian(Ledger().charge_federation(known), guarantee())
