"""Which clients take part in a round.

Shapes: none; a selector costs O(cohort), not O(population).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fedlearn.errors import SettingError, is_count, is_number, require
from fedlearn.records import ClientId


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingLaw:
    """What a privacy ledger may assume of a selector.

    Attributes:
        kind: ``all`` clients each round; a ``fixed_size`` cohort drawn uniformly without replacement; ``poisson``, each
            client by itself with equal probability; ``min_separation``, a cohort of fixed size in which no client
            takes part again before ``separation`` rounds have passed.
        size: of the cohort; of the expected one for ``poisson``.
        rate: of ``poisson``, where it is the probability that is fixed and not the expected size.
        separation: in rounds, for ``min_separation``.
    """

    kind: Literal["all", "fixed_size", "poisson", "min_separation"]
    size: float | None = None
    rate: float | None = None
    separation: int | None = None


class Selector(NamedTuple):
    """A way to choose cohorts.

    Attributes:
        choose: ``(round, clients, rng) -> cohort``.
        law: what a ledger may assume, or None.
    """

    choose: Callable[[int, Sequence[ClientId], np.random.Generator], Sequence[ClientId]]
    law: SamplingLaw | None = None


def everyone() -> Selector:
    """All clients, each round."""
    return Selector(choose=lambda round, clients, rng: clients, law=SamplingLaw(kind="all"))


def uniform(clients_per_round: int | None) -> Selector:
    """A cohort of fixed size drawn uniformly without replacement; None means everyone.

    Raises:
        SettingError: if ``clients_per_round`` is less than 1, or, on the first round, more than there are clients.
    """
    if clients_per_round is None:
        return everyone()
    name, expected = "clients_per_round", "null (everyone), or a whole number >= 1"
    require(is_count(clients_per_round), name, clients_per_round, expected, f"{name}=10")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        _require_enough(clients_per_round, len(clients), "the number of clients")
        return [clients[i] for i in rng.choice(len(clients), clients_per_round, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="fixed_size", size=clients_per_round))


def poisson(expected: float | None = None, *, rate: float | None = None) -> Selector:
    """Each client by itself with equal probability: what amplification by sampling assumes.

    Cohorts differ in size and may be empty.

    Args:
        expected: clients a round on average, > 0; the probability is this over the number of clients. Or
        rate: the probability, in (0, 1], however many clients there come to be.

    Raises:
        SettingError: not one of the two is given, or it is out of range; on the first round, if more clients are
            expected than there are.
    """
    if rate is None:
        positive = is_number(expected, at_least=0) and 0 < (expected or 0) < float("inf")
        require(positive, "clients_per_round", expected, "a finite number > 0", "clients_per_round=10")
    else:
        share = is_number(rate, at_least=0) and 0 < rate <= 1 and expected is None
        require(share, "rate", rate, "a share in (0, 1], in place of expected", "rate=0.01")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        chance = rate or 0.0
        if expected is not None:
            _require_enough(expected, len(clients), "the number of clients")
            chance = expected / len(clients)
        # a binomial number of clients, then who they are: the same law as a coin for each, in O(cohort)
        size = int(rng.binomial(len(clients), chance))
        return [clients[i] for i in rng.choice(len(clients), size, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="poisson", size=expected, rate=rate))


def min_separation(clients_per_round: int, separation: int) -> Selector:
    """Cohorts of fixed size in which a client that took part waits for at least ``separation`` rounds.

    Round t draws uniformly from the clients whose id is t modulo ``separation``, so that the rule holds across
    resumptions without anyone keeping count.

    Raises:
        SettingError: a number is less than 1, or, when it is their turn, too few clients have such an id.
    """
    size, wait = clients_per_round, separation
    require(is_count(size), "clients_per_round", size, "a whole number >= 1", "clients_per_round=10")
    require(is_count(wait), "separation", wait, "a whole number of rounds >= 1", "separation=10")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        turn = round % wait
        regular = isinstance(clients, range) and clients.start == 0 and clients.step == 1
        whose: Sequence[ClientId] = clients[turn::wait] if regular else [c for c in clients if c % wait == turn]
        _require_enough(size, len(whose), f"the clients whose turn it is, one in {wait}")
        return [whose[i] for i in rng.choice(len(whose), size, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="min_separation", size=size, separation=wait))


def _require_enough(asked: float, available: int, what: str) -> None:
    name = "strategy.clients_per_round"
    if asked > available:
        raise SettingError(name, asked, f"at most {available}, {what}", f"{name}={available}")
