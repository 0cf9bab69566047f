from dataclasses import replace

import pytest

from fedlearn import CompositionError, Selector, Stage, Strategy, clip, everyone, expected_mean, mean, stacked
from fedlearn.core import PrivacyGuarantee
from strategies import fedprox, scaffold

NOISE = Stage(event="gaussian", is_nonexpansive=True)
EQUAL, FIXED = mean(weighting="equal"), expected_mean(10)


def first_update(updates, state, context):
    return updates.delta_KD[0], state


def test_a_privacy_claim_needs_an_aggregator_of_known_sensitivity():
    with pytest.raises(CompositionError, match=r"sensitivity(.|\n)*weighting='equal'"):
        Strategy(select=everyone(), stages=(clip(1.0), NOISE), aggregate=mean())
    with pytest.raises(CompositionError, match="sensitivity"):
        Strategy(select=everyone(), stages=(NOISE,), aggregate=stacked(first_update))
    Strategy(select=everyone(), stages=(clip(1.0), NOISE), aggregate=FIXED)


def test_a_privacy_claim_needs_a_denominator_that_does_not_shrink_with_those_who_drop_out():
    with pytest.raises(CompositionError, match=r"number of responding clients(.|\n)*expected_mean"):
        Strategy(select=everyone(), stages=(clip(1.0), NOISE), aggregate=EQUAL)


def test_a_privacy_claim_needs_a_clip_before_the_noise():
    with pytest.raises(CompositionError, match=r"bounds an update(.|\n)*clip"):
        Strategy(select=everyone(), stages=(NOISE,), aggregate=FIXED)


def test_a_privacy_claim_needs_a_known_sampling_law():
    anyhow = Selector(choose=lambda round, clients, rng: clients)
    with pytest.raises(CompositionError, match=r"sampling law(.|\n)*uniform"):
        Strategy(select=anyhow, stages=(clip(1.0), NOISE), aggregate=FIXED)


def test_masking_needs_a_sum():
    with pytest.raises(CompositionError, match="mask"):
        Strategy(select=everyone(), stages=(Stage(needs_sum=True),), aggregate=stacked(first_update))


def test_what_follows_a_clip_must_not_lengthen_updates_again():
    with pytest.raises(CompositionError, match=r"clip(.|\n)*after it"):
        Strategy(select=everyone(), stages=(clip(1.0), Stage()))
    Strategy(select=everyone(), stages=(Stage(), clip(1.0), clip(0.5)))


def test_a_strategy_cannot_be_changed_after_it_was_checked():
    strategy = Strategy(select=everyone())
    with pytest.raises(AttributeError):
        strategy.aggregate = mean(weighting="equal")


def guarantee(**fields):
    return PrivacyGuarantee(
        kind="mine",
        unit="client",
        adjacency="one client added or removed",
        charge=lambda ledger, release: ledger,
        epsilon_of=lambda ledger: None,
        **fields,
    )


def test_a_guarantee_is_refused_for_further_vectors_that_it_does_not_cover():
    with pytest.raises(CompositionError, match="adds no noise to these vectors"):
        replace(scaffold(), privacy_guarantee=guarantee())
    assert replace(scaffold(), privacy_guarantee=guarantee(covers_extra_vectors=True))
    assert replace(fedprox(), privacy_guarantee=guarantee())
