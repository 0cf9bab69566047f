"""The number of clients that may fail: a whole number is a count, a float is a share, and null is the default."""

import json
import random
from fractions import Fraction

import pytest
from omegaconf import OmegaConf

from fedlearn import Schedule
from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.core.records import Failure, FailureStage
from fedlearn.errors import SettingError, TooManyFailures
from fedlearn.loop.failure_limit import check_failures, failure_limit
from fedlearn.runner.compat import parse_override


@pytest.mark.parametrize(
    ("max_failures", "num_clients", "limit"),
    [
        *((1, 100, 1), (1.0, 100, 100), (0, 9, 0), (0.0, 9, 0), (2, 3, 2), (7, 3, 7)),
        *((0.3, 3, 0), (0.3, 4, 1), (0.34, 3, 1), (0.29, 100, 29), (0.1, 30, 3)),
        *((None, 0, 1), (None, 1, 1), (None, 3, 1), (None, 6, 1), (None, 7, 2), (None, 100, 30)),
    ],
)
def test_a_whole_number_is_a_count_and_a_float_a_share(max_failures, num_clients, limit):
    assert failure_limit(max_failures, num_clients) == limit


def test_a_share_is_exact_for_any_number_of_clients():
    rng = random.Random(1)
    for _ in range(2000):
        percent, num_clients = rng.randint(0, 100), rng.randint(1, 2000)
        assert failure_limit(percent / 100, num_clients) == Fraction(percent, 100) * num_clients // 1


@pytest.mark.parametrize("value", [-1, -0.1, 1.01, float("nan"), float("inf"), True, False, "30%", "1", [1], {}])
def test_another_value_is_refused_with_both_forms(value):
    with pytest.raises(SettingError, match="max_failures is") as caught:
        Schedule(rounds=1, max_failures=value)
    assert "a whole number of clients >= 0, a share of the cohort" in str(caught.value)


@pytest.mark.parametrize("text", ["1", "1.0", "0.3", "0", "0.0", "null"])
def test_a_value_keeps_its_kind_from_the_command_line_to_the_coordinator_and_into_the_run_folder(text, tmp_path):
    (override,) = parse_override(f"max_failures={text}")
    OmegaConf.save(OmegaConf.create({"max_failures": override.value}), tmp_path / "config.yaml")
    stored = OmegaConf.load(tmp_path / "config.yaml").max_failures
    sent = json.loads(json.dumps(override.value))
    assert type(stored) is type(sent) is type({"null": None}.get(text, float(text) if "." in text else 1))


def result(num_failed, num_clients, stage=FailureStage.NODE):
    failures = tuple(Failure(client=client, stage=stage, reason="site west: busy") for client in range(num_failed))
    return PartialAggregate(aggregator_state={}, failures=failures, num_updates=num_clients - num_failed)


def test_the_default_allows_one_failure_in_a_federation_of_three():
    check_failures(result(1, 3), 3, None)
    with pytest.raises(TooManyFailures, match=r"2 of 3 clients failed, more than max_failures=null allows \(1\)"):
        check_failures(result(2, 3), 3, None)


def test_a_round_without_an_update_is_refused_for_any_limit():
    for limit in (None, 1, 9, 1.0):
        with pytest.raises(TooManyFailures, match=r"1 of 1 clients failed, and a round needs an update; .*west"):
            check_failures(result(1, 1), 1, limit)


def test_clients_that_were_not_needed_are_no_failures():
    check_failures(result(2, 3, FailureStage.NOT_NEEDED), 3, 0)
