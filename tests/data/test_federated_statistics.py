from __future__ import annotations

import math

import numpy as np
import pytest

from fedlearn.core.privacy_ledger import Event
from fedlearn.data.federated_statistics import ColumnSums, Noise, add_noise, add_sums, column_sums, project_to_bounds
from fedlearn.data.tables import Table
from fedlearn.errors import DataError, SettingError

RNG = np.random.default_rng(5)
AGE = np.where(RNG.random(300) < 0.1, np.nan, RNG.normal(55, 10, 300))
SEX = np.array(["f", "m", None], object)[RNG.integers(0, 3, 300)]


def table(rows=slice(None)):
    age, sex = AGE[rows], SEX[rows]
    return Table({"age": age, "sex": sex}, (("a.csv", 2, len(age)),))


def parts(cuts):
    return [column_sums(table(slice(start, end))) for start, end in zip([0, *cuts], [*cuts, 300], strict=True)]


@pytest.mark.parametrize("cuts", [(), (100, 200), (1, 2, 299)])
def test_sums_of_clients_are_those_of_all_rows_together_however_they_are_cut(cuts):
    whole = add_sums(parts(cuts))
    assert whole["age"].mean == pytest.approx(np.nanmean(AGE))
    assert whole["age"].std == pytest.approx(np.nanstd(AGE))
    assert whole["sex"].counts == {"f": (SEX == "f").sum(), "m": (SEX == "m").sum()}


def test_the_order_of_clients_does_not_matter():
    forth, back = add_sums(parts((50, 120))), add_sums(reversed(parts((50, 120))))
    assert forth["sex"] == back["sex"]
    assert forth["age"].total == pytest.approx(back["age"].total, rel=1e-14)


def test_a_column_that_does_not_vary_or_is_empty_can_be_divided_by():
    assert ColumnSums(num_rows=3, num_present=3, total=6, sum_squares=12).std == 1
    assert (ColumnSums(num_rows=3).mean, ColumnSums(num_rows=3).std) == (0, 1)


def test_clients_with_other_columns_or_none_are_refused():
    with pytest.raises(DataError, match="different columns"):
        add_sums([column_sums(table()), {"age": ColumnSums()}])
    with pytest.raises(DataError, match="no client"):
        add_sums([])


def noise(multiplier=1.0, *, seed=1, **settings):
    given = {"bounds": {"age": (0, 100)}, "categories": {"sex": ("f", "m")}} | settings
    return Noise(multiplier=multiplier, seed=seed, **given)


def released(of, how):
    return project_to_bounds(add_noise(column_sums(of, noise=how), how), how)


def test_noisy_statistics_are_near_the_exact_ones_and_cost_one_event():
    how = noise(0.1)
    statistics = released(table(), how)
    assert statistics["age"].mean == pytest.approx(np.nanmean(AGE), abs=1)
    assert statistics["age"].std == pytest.approx(np.nanstd(AGE), abs=2)
    assert statistics["sex"].counts["f"] == pytest.approx((SEX == "f").sum(), abs=2)
    ledger = how.initial_ledger(range(3))
    assert [ledger.client_history(client) for client in range(3)] == [((Event(0.1), 1),)] * 3


def vector(statistics):
    """Return the released vector of exact statistics, in the released units."""
    age, sex = statistics["age"], statistics["sex"]
    sum_z = (age.total - 50 * age.num_present) / 50
    sum_zz = (age.sum_squares - 100 * age.total + 2500 * age.num_present) / 2500
    return np.array([age.num_rows, age.num_present, sum_z, sum_zz, *(sex.counts.get(value, 0) for value in ("f", "m"))])


@pytest.mark.parametrize("age", [0.0, 100.0, 1e9, -1e9, 50.0, np.nan])
@pytest.mark.parametrize("sex", ["f", "m", "unheard of", None])
def test_one_record_changes_what_is_released_by_no_more_than_the_sensitivity(age, sex):
    how = noise()
    item = Table({"age": np.array([*AGE, age]), "sex": np.array([*SEX, sex], object)}, (("a.csv", 2, 301),))
    with_it, without_it = (vector(add_sums([column_sums(of, noise=how)])) for of in (item, table()))
    assert np.linalg.norm(with_it - without_it) <= how.sensitivity + 1e-9


def test_noise_has_the_deviation_that_the_ledger_is_charged_for():
    rows = [released(table(), noise(2.0, seed=seed))["sex"].num_rows for seed in range(400)]
    assert np.std(rows) == pytest.approx(2.0 * math.sqrt(1 + 3 + 1), rel=0.15)
    assert np.mean(rows) == pytest.approx(300, abs=1)


def test_noise_of_real_clients_does_not_follow_from_a_seed():
    first, again = (released(table(), noise(seed=1))["age"] for _ in range(2))
    assert first == again
    first, again = (released(table(), noise(seed=None))["age"] for _ in range(2))
    assert first != again


def test_every_column_needs_bounds_or_categories():
    with pytest.raises(DataError, match="column sex needs bounds or categories"):
        released(table(), noise(categories={}))
    with pytest.raises(SettingError, match=r"bounds\.age is \(3, 3\)"):
        noise(bounds={"age": (3, 3)})
    with pytest.raises(SettingError, match="multiplier is 0"):
        noise(0)


def test_each_client_adds_noise_of_its_own_and_parts_still_add_up():
    how = noise(1e-9)
    part = column_sums(table(), noise=how)
    together = project_to_bounds(add_sums([add_noise(part, how, client=client) for client in range(3)]), how)
    assert together["age"].mean == pytest.approx(np.nanmean(AGE), rel=1e-6)
    assert together["age"].std == pytest.approx(np.nanstd(AGE), rel=1e-4)
    assert together["sex"].num_rows == pytest.approx(900, rel=1e-6)
    assert add_noise(part, noise(), client=0)["age"] != add_noise(part, noise(), client=1)["age"]


def test_noise_larger_than_the_data_leaves_a_scale_that_can_be_used():
    for seed in range(20):
        age = released(table(slice(0, 5)), noise(100.0, seed=seed))["age"]
        assert 0 <= age.mean <= 100
        assert 0 < age.std <= 50.001
