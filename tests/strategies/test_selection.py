"""Selectors follow their sampling laws, and adaptive ones prefer the clients that their papers prefer."""

from collections import Counter

import numpy as np
import pytest

import strategies
from fedlearn import (
    CompositionError,
    LocalSettings,
    Schedule,
    SettingError,
    Strategy,
    federate,
    poisson,
    serial,
    start,
    uniform,
)
from fedlearn.algorithm import cyclic, get_selector, round_robin, weighted
from fedlearn.core import checkpoint
from fedlearn.privacy.mechanisms import local
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem

TRAINER = LinearTrainer(3)


def rng(seed):
    return np.random.default_rng(seed)


def cohorts(strategy, data, *, rounds, engine=None, state=None):
    engine = engine or serial(data, TRAINER)
    state = state or start(strategy, TRAINER.init(1), engine, seed=1)
    return list(federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=LOCAL_SETTINGS))


def test_round_robin_asks_all_equally_often_and_in_order():
    select = round_robin(4)
    asked = [client for t in range(1, 7) for client in select.choose(t, range(10, 22), rng(0))]
    assert asked == [*range(10, 22)] * 2
    assert select.law is None, "without sampling there is no amplification"
    with pytest.raises(SettingError, match="at most 3"):
        select.choose(1, range(3), rng(0))


@pytest.mark.parametrize("clients_per_round", [1, 2, 4])
def test_a_cycle_has_each_client_once_and_cycles_have_different_orders(clients_per_round):
    data = linear_problem()
    num_clients = len(data.clients)
    rounds = cohorts(Strategy(select=cyclic(clients_per_round)), data, rounds=3 * num_clients)
    visits = Counter(dict.fromkeys(data.clients, 0))
    for done in rounds:
        visits.update(done.cohort)
        assert max(visits.values()) - min(visits.values()) <= 1
    visited = [client for done in rounds for client in done.cohort]
    cycles = [visited[start : start + num_clients] for start in range(0, len(visited), num_clients)]
    assert clients_per_round > 1 or len({tuple(cycle) for cycle in cycles}) > 1
    assert cyclic(1).law is None
    with pytest.raises(SettingError, match="at most 3"):
        cyclic(4).choose(1, range(3), rng(0), **cyclic(4).initial_state)


def test_a_poisson_cohort_has_the_size_and_spread_of_independent_coins():
    sizes = [len(poisson(3).choose(1, range(30), rng(seed))) for seed in range(3000)]
    assert np.mean(sizes) == pytest.approx(3, abs=0.15)
    assert np.var(sizes) == pytest.approx(30 * 0.1 * 0.9, rel=0.15)
    assert poisson(3).law.kind == "poisson"


def test_a_weighted_cohort_follows_the_numbers_of_examples_once_they_are_told():
    """Check clients of 5, 9, ..., 25 examples: the first client of a cohort of one is drawn in proportion."""
    data = linear_problem()
    engine = serial(data, TRAINER)
    strategy = Strategy(select=weighted(6))
    memory = cohorts(strategy, data, rounds=1, engine=engine)[-1].state.select
    assert memory["value_N"].tolist() == [5, 9, 13, 17, 21, 25]
    drawn = Counter(weighted(1).choose(2, range(6), rng(seed), **memory)[0] for seed in range(6000))
    shares = np.array([drawn[k] for k in range(6)]) / 6000
    assert np.abs(shares - memory["value_N"] / 90).max() < 0.025
    fresh = Counter(
        weighted(1).choose(1, range(6), rng(seed), **strategy.select.initial_state)[0] for seed in range(6000)
    )
    assert max(fresh.values()) - min(fresh.values()) < 250
    assert weighted(1).law is None


def noisy(*clients):
    """Return a problem with random targets at these clients, so that their losses stay large."""
    data = linear_problem(num_clients=12)

    def train(client):
        current = data.train(client)
        noise = np.random.default_rng(client).normal(0, 20, len(current.y)).astype(np.float32)
        return type(current)(current.x, current.y + noise) if client in clients else current

    return type(data)(task="regression", num_classes=1, clients=data.clients, train=train, test=data.test)


def test_power_of_choice_asks_everyone_once_and_then_those_with_large_losses():
    data = noisy(2, 7, 11)
    strategy = strategies.power_of_choice(clients_per_round=3, num_candidates=12)
    rounds = cohorts(strategy, data, rounds=12)
    first = [client for item in rounds[:4] for client in item.cohort]
    assert sorted(first) == list(range(12))
    later = Counter(client for item in rounds[8:] for client in item.cohort)
    assert sum(later[k] for k in (2, 7, 11)) >= 0.9 * sum(later.values())


def test_power_of_choice_among_as_many_candidates_as_take_part_is_uniform():
    select = strategies.power_of_choice(clients_per_round=3, num_candidates=3).select
    memory = {"clients_N": np.arange(10), "value_N": np.arange(10.0), "round_N": np.ones(10, int)}
    counts = Counter(k for seed in range(4000) for k in select.choose(5, range(10), rng(seed), **memory))
    assert max(abs(count - 1200) for count in counts.values()) < 5 * np.sqrt(1200 * 0.7)
    assert select.law is None


def test_oort_prefers_useful_clients_and_goes_on_trying_new_ones():
    data = noisy(2, 7, 11)
    strategy = strategies.oort(clients_per_round=4, exploration=0.5, min_exploration=0.0, decay=0.5)
    rounds = cohorts(strategy, data, rounds=30)
    assert len({client for item in rounds[:3] for client in item.cohort}) >= 6
    later = Counter(client for item in rounds[8:] for client in item.cohort)
    assert sum(later[k] for k in (2, 7, 11)) > 0.5 * sum(later.values())
    assert all(len(set(item.cohort)) == 4 for item in rounds)


def test_oort_comes_back_to_a_client_that_was_not_asked_for_long():
    select = strategies.oort(clients_per_round=1, exploration=0.0, min_exploration=0.0).select
    known = {"clients_N": np.arange(2), "value_N": np.array([1.0, 1.0]), "round_N": np.array([1, 900])}
    drawn = Counter(select.choose(1000, range(2), rng(seed), **known)[0] for seed in range(300))
    assert drawn[0] > 280
    assert select.law is None


@pytest.mark.parametrize(
    "strategy", [strategies.power_of_choice(clients_per_round=2), strategies.oort(clients_per_round=2)]
)
def test_what_a_selector_has_learnt_is_in_the_checkpoint(strategy, tmp_path):
    data = linear_problem()
    whole = cohorts(strategy, data, rounds=6)
    engine = serial(data, TRAINER)
    half = cohorts(strategy, data, rounds=3, engine=engine)[-1].state
    path = checkpoint.save(tmp_path, half, engine.client_states, layout=TRAINER.layout)
    state, _ = checkpoint.load(path, TRAINER.layout)
    resumed = cohorts(strategy, data, rounds=6, state=state)
    assert [item.cohort for item in resumed] == [item.cohort for item in whole[3:]]
    assert np.array_equal(resumed[-1].state.params_D, whole[-1].state.params_D)


def test_a_choice_by_losses_does_not_pass_a_protection():
    with pytest.raises(CompositionError, match=r"uses the training metrics of clients(.|\n)*uniform"):
        local(noise_multiplier=1.0).protect(
            strategies.power_of_choice(weighting="equal"), LocalSettings(), Population(clients=range(40), rounds=3)
        )


def test_a_selector_is_had_by_name():
    assert get_selector("uniform", None).law.kind == "all"
    assert get_selector("uniform", 3).law == uniform(3).law
    assert get_selector("poisson", 3).law == poisson(3).law
    with pytest.raises(SettingError, match="uniform, poisson, weighted, round_robin, cyclic"):
        get_selector("best", 3)
