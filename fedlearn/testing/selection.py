"""Check the cohorts, the random numbers and the sampling law of a selector.

Shapes: N clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.algorithm.client_selection import SamplingLaw, Selector

ROUNDS = 300
MAX_DEVIATION = 6.0  # in standard deviations: a correct selector fails once in 10^8 checks


def check_selection(selector: Selector, *, num_clients: int) -> None:
    """Check that a selector draws from its generator only, and follows its stated law.

    Raises:
        AssertionError: a guarantee does not hold; the message names it.
    """
    clients = range(num_clients)
    cohorts = [_choose(selector, round, clients) for round in range(1, ROUNDS + 1 if selector.law else 5)]
    for round, cohort in enumerate(cohorts[:5], start=1):
        known = set(cohort) <= set(clients) and len(set(cohort)) == len(cohort)
        assert known, f"a cohort must consist of different clients of the population, not {cohort}"
        same = cohort == _choose(selector, round, clients)
        assert same, "a selector must draw from the generator that it gets, and keep no state of its own"
    if selector.law is not None:
        _check_law(selector.law, cohorts, num_clients)


def _choose(selector: Selector, round: int, clients: Sequence[int]) -> list[int]:
    rng = np.random.default_rng((1, round))
    return sorted(int(client) for client in selector.choose(round, clients, rng, **selector.initial_state))


def _check_law(law: SamplingLaw, cohorts: Sequence[Sequence[int]], num_clients: int) -> None:
    message = f"the selector does not follow the law that it states: {law.kind}"
    if law.kind == "all":
        assert all(len(cohort) == num_clients for cohort in cohorts), message
        return
    if law.kind in ("fixed_size", "min_separation"):
        assert all(len(cohort) == law.size for cohort in cohorts), f"{message}, {law.size} clients in each round"
    if law.kind == "min_separation":
        last: dict[int, int] = {}
        for round, cohort in enumerate(cohorts):
            apart = all(round - last.get(client, -num_clients * ROUNDS) >= (law.separation or 1) for client in cohort)
            assert apart, f"{message}, {law.separation} rounds between two rounds of a client"
            last |= dict.fromkeys(cohort, round)
        return
    rate = law.rate if law.rate is not None else (law.size or 0) / num_clients
    count_N = np.bincount(np.concatenate([np.asarray(cohort, np.int64) for cohort in cohorts]), minlength=num_clients)
    deviation = MAX_DEVIATION * np.sqrt(len(cohorts) * rate * (1 - rate)) + 1
    equal = np.abs(count_N - rate * len(cohorts)).max() <= deviation
    assert equal, f"{message}, each client with probability {rate:.3g}"
    if law.kind == "poisson" and 0 < rate < 1:
        assert len({len(cohort) for cohort in cohorts}) > 1, f"{message}, cohorts of different size"
