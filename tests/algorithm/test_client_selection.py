import numpy as np
import pytest

from fedlearn import SettingError, everyone, uniform
from fedlearn.algorithm import lookup_values, update_values


def rng(seed=0):
    return np.random.default_rng(seed)


def test_everyone_takes_everyone():
    assert list(everyone().choose(1, range(5), rng())) == [0, 1, 2, 3, 4]
    assert uniform(None).law.kind == "all"


def test_a_uniform_cohort_has_its_size_and_no_client_twice():
    for seed in range(20):
        cohort = uniform(7).choose(1, range(3, 23), rng(seed))
        assert len(set(cohort)) == 7
        assert set(cohort) <= set(range(3, 23))


def test_every_client_is_equally_likely():
    counts = np.zeros(10)
    for seed in range(4000):
        counts[uniform(3).choose(1, range(10), rng(seed))] += 1
    expected = 4000 * 0.3
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.7)


def test_a_cohort_of_a_million_clients_costs_no_list_of_a_million():
    class Population:
        asked = 0

        def __len__(self):
            return 1_000_000

        def __getitem__(self, i):
            Population.asked += 1
            return i

    assert len(uniform(100).choose(1, Population(), rng())) == 100
    assert Population.asked == 100


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "ten"])
def test_a_cohort_size_that_is_no_count_is_refused(size):
    with pytest.raises(SettingError, match="clients_per_round"):
        uniform(size)


def test_a_cohort_larger_than_the_population_is_refused_with_the_number_of_clients():
    with pytest.raises(SettingError, match=r"strategy.clients_per_round is 9\n.*at most 4"):
        uniform(9).choose(1, range(4), rng())


def test_what_is_remembered_of_clients_is_replaced_where_there_is_news_and_found_again():
    empty = {"who": np.zeros(0), "loss": np.zeros(0)}
    first = update_values(empty, {"who": np.array([7, 2]), "loss": np.array([0.7, 0.2])}, key="who")
    then = update_values(first, {"who": np.array([5, 2]), "loss": np.array([0.5, 9.0])}, key="who")
    assert then["who"].tolist() == [2, 5, 7]
    assert then["loss"].tolist() == [9.0, 0.5, 0.7]
    assert first["loss"].tolist() == [0.2, 0.7], "choose must not change the selector state in place"
    assert lookup_values([7, 3, 2], then["who"], then["loss"], default=-1).tolist() == [0.7, -1, 9.0]
    assert lookup_values([7], empty["who"], empty["loss"], default=-1).tolist() == [-1]
