"""Threads of Python keep the order, the errors and the bits of a loop, and BLAS has one thread meanwhile."""

import os
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from fedlearn.algorithm.aggregation import add_rows
from fedlearn.core import threads
from fedlearn.core.threads import available_cores, map_in_threads, num_threads
from fedlearn.robust import robust_aggregation as rules


@pytest.fixture
def four(monkeypatch):
    """Use four threads on any machine."""
    monkeypatch.setattr(threads, "num_threads", lambda: 4)


def blas_threads():
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}


def test_results_keep_the_order_of_the_items_and_few_wait(four):
    started = []

    def square(number):
        started.append(number)
        return number * number

    results = map_in_threads(square, range(100))
    assert next(results) == 0
    assert max(started) <= 8, "two results per thread may wait"
    assert [*results] == [number * number for number in range(1, 100)]
    assert [*map_in_threads(square, [])] == []


def test_an_error_of_an_item_reaches_the_caller_and_ends_the_threads(four):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        [*map_in_threads(lambda number: 1 // (number - 5), range(100))]
    assert threading.active_count() == before


def test_blas_has_one_thread_during_the_work_and_its_threads_again_after_it(four):
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert {max(seen) for seen in map_in_threads(lambda number: blas_threads(), range(9))} == {1}
        assert blas_threads() == before


@pytest.mark.parametrize(("setting", "expected"), [("1", 1), ("0", None), ("many", None), ("9999", None), ("", None)])
def test_the_variable_of_openmp_limits_the_threads(monkeypatch, setting, expected):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", setting)
    assert num_threads() == (expected or available_cores())


RULES = {
    "median": rules.coordinate_median,
    "trimmed mean": lambda x_KD: rules.trimmed_mean(x_KD, 3),
    "mean around the median": lambda x_KD: rules.mean_around_median(x_KD, 5),
    "squared distances": rules.squared_distances,
    "distances": lambda x_KD: rules.distances_to(x_KD, x_KD[0]),
    "inner products": lambda x_KD: rules.inner_products(x_KD, x_KD[0]),
    "sum": lambda x_KD: add_rows(None, x_KD, np.arange(len(x_KD))),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_has_the_same_bits_with_any_number_of_threads(monkeypatch, rule):
    monkeypatch.setattr(rules, "MAX_ELEMENTS", 2**9)
    monkeypatch.setattr("fedlearn.algorithm.aggregation.TILE_SIZE", 2**6)
    monkeypatch.setattr("fedlearn.algorithm.aggregation.COLUMNS_PER_THREAD", 2**7)
    monkeypatch.setattr("fedlearn.algorithm.aggregation.MIN_THREADED_SIZE", 1)
    x_KD = np.random.default_rng(0).standard_normal((13, 1000), dtype=np.float32)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(threads, "num_threads", lambda count=count: count)
        results.append(rule(x_KD))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_sorting_columns_as_rows_gives_the_order_of_a_sort_of_columns():
    x_KC = np.random.default_rng(0).standard_normal((31, 77), dtype=np.float32)
    x_KC[::3] = 0.0
    x_KC[1::3] = -0.0
    sorted_KC = rules.sort_columns(x_KC)
    assert np.array_equal(sorted_KC, np.sort(x_KC, axis=0))
    assert sorted_KC.flags.c_contiguous
