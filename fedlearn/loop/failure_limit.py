"""Decide how many clients may fail in a round: a count, a share of the cohort, or the default."""

from __future__ import annotations

from math import floor
from typing import Any

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.errors import TooManyFailures, is_count, is_number, require

DEFAULT_SHARE = 0.3  # share of the cohort; at least one client
ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def require_failure_limit(value: Any) -> None:
    """Refuse a value that is not a limit of failures.

    Raises:
        SettingError: The value is not a count >= 0, a share in [0, 1], or None.
    """
    is_share = isinstance(value, float) and is_number(value, at_least=0) and value <= 1
    expected = "a whole number of clients >= 0, a share of the cohort from 0.0 to 1.0 (with a decimal point), or null"
    is_valid = value is None or is_count(value, at_least=0) or is_share
    require(is_valid, "max_failures", value, expected, "max_failures=2")


def failure_limit(max_failures: float | None, num_clients: int) -> int:
    """Return the largest number of clients that may fail in a round.

    Args:
        max_failures: a whole number is a count, and a float is a share of the cohort; None: 30 % of the cohort, and at
            least one client.
        num_clients: number of clients of the cohort, >= 0.

    >>> [failure_limit(limit, 10) for limit in (1, 1.0, 0.3, 0.05, 0, None)], failure_limit(None, 3)
    ([1, 10, 3, 0, 0, 3], 1)
    """
    if max_failures is None:
        return max(1, failure_limit(DEFAULT_SHARE, num_clients))
    if isinstance(max_failures, int):
        return max_failures
    return floor(max_failures * num_clients + ROUNDING)


def check_failures(partial: PartialAggregate, num_clients: int, max_failures: float | None) -> None:
    """Stop the run if too many clients failed, or if there is no update.

    Raises:
        TooManyFailures: More clients failed than ``max_failures`` allows, or no client sent an update.
    """
    failures = [failure for failure in partial.failures if failure.stage.counts_as_failure]
    num_failed, limit = len({failure.client for failure in failures}), failure_limit(max_failures, num_clients)
    if num_failed <= limit and partial.num_updates:
        return
    setting = f"max_failures={'null' if max_failures is None else max_failures}"
    problem = f"more than {setting} allows ({limit})" if num_failed > limit else "and a round needs an update"
    first = failures[0] if failures else None
    cause = f"; first failure: client {first.client}, at stage {first.stage}: {first.reason}" if first else ""
    raise TooManyFailures(f"{num_failed} of {num_clients} clients failed, {problem}{cause}", partial.failures)
