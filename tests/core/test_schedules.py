"""Schedules of the learning rate: their values, their limits, and the steps that share a rate."""

import numpy as np
import pytest

from fedlearn import LocalSettings, SettingError
from fedlearn.core.named_option import NamedOption
from fedlearn.core.schedules import SCHEDULES, learning_rates, over_rounds, over_whole_run, rate_factors, shares_rates


def over(name, num_rounds, **values):
    return [rate_factors({"name": name, **values}, round, 1)[0] for round in range(1, num_rounds + 1)]


def test_a_schedule_over_rounds_has_the_values_of_its_formula():
    assert over("linear", 4, rounds=4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert over("cosine", 3, rounds=2, end=0.2) == pytest.approx([1, 0.6, 0.2])
    assert over("step", 5, every=2, gamma=0.1) == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert over("exponential", 3, gamma=0.5) == pytest.approx([1, 0.5, 0.25])
    assert over("constant", 4, warmup=2) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert over("step", 5, warmup=1, every=2, gamma=0.1) == pytest.approx([1 / 2, 1, 1, 0.1, 0.1])


def test_a_schedule_over_steps_starts_again_in_each_round():
    first, ninth = (rate_factors({"name": "linear", "over": "steps"}, round, 4) for round in (1, 9))
    assert first.tolist() == ninth.tolist() == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("unit", ["rounds", "steps", "run"])
def test_no_schedule_exceeds_the_learning_rate(name, unit):
    """Check that a schedule in a request cannot circumvent the bound of a node on the learning rate."""
    schedule = over_rounds({"name": name, "over": unit, "warmup": 1.5}, 3)
    factors = np.concatenate([rate_factors(schedule, round, 7) for round in range(1, 9)])
    assert factors.min() >= 0
    assert factors.max() <= 1


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ("fast", "schedule"), (3, "schedule"), ({"name": "cosin"}, "schedule"),
        ({"name": "cosine", "warm": 1}, "schedule.warm"),
        ({"name": "cosine", "end": 2}, "schedule.end"), ({"name": "step", "gamma": 2}, "schedule.gamma"),
        ({"name": "step", "every": 0}, "schedule.every"), ({"name": "linear", "over": "days"}, "schedule.over"),
        ({"end": 0.1}, "schedule"), ({"name": "linear", "rounds": 0}, "schedule.rounds"),
    ],
)  # fmt: skip
def test_schedules_out_of_range_are_refused_by_name(values, setting):
    with pytest.raises(SettingError) as caught:
        LocalSettings(schedule=values)
    assert caught.value.setting == setting


def test_the_number_of_rounds_comes_from_the_run_unless_it_is_stated():
    assert over_rounds("cosine", 9) == {"name": "cosine", "rounds": 9}
    assert over_rounds({"name": "cosine", "rounds": 3}, 9)["rounds"] == 3
    assert over_rounds("constant", 9) == "constant"
    with pytest.raises(SettingError, match=r"schedule\.rounds is None"):
        rate_factors("cosine", 1, 1)


def test_a_baseline_follows_the_schedule_in_a_single_request():
    stepwise = rate_factors(over_whole_run({"name": "step", "every": 2, "gamma": 0.5}, 4), 1, 8)
    assert stepwise.tolist() == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]


def test_the_rates_of_clients_follow_their_rounds_and_steps():
    rounds_K, steps_K = np.array([1, 3]), np.array([2, 1])
    assert learning_rates("constant", 0.1, rounds_K, steps_K) is None
    rates_KS = learning_rates(NamedOption(name="exponential", gamma=0.5), 0.1, rounds_K, steps_K)
    assert rates_KS == pytest.approx(np.array([[0.1, 0.1], [0.025, 0.0]]))
    assert not shares_rates(rates_KS, steps_K)
    assert shares_rates(rates_KS[:1], steps_K[:1])


def test_a_function_is_a_schedule_and_its_values_are_checked():
    rates = learning_rates(lambda round, step, num_steps: 1 / (round + step), 0.5, np.array([1]), np.array([3]))
    assert rates.tolist() == [[0.5, 0.25, 0.5 / 3]]
    with pytest.raises(SettingError, match="factors >= 0"):
        rate_factors(lambda round, step, num_steps: -1.0, 1, 2)
