"""Which clients take part in a round.

Shapes: K clients in a cohort, N that took part before. A selector costs O(cohort), not O(population); those that learn
cost O(N) too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from fedlearn.algorithm.transforms import Context
from fedlearn.core.records import ClientId, State
from fedlearn.errors import SettingError, is_count, is_number, require


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingLaw:
    """State the law of a selector, which a privacy ledger relies on.

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
    """Select the cohort of each round.

    Attributes:
        choose: ``(round, clients, rng, **memory) -> cohort``.
        law: what a ledger may assume, or None.
        initial_state: what it remembers before the first round: named arrays. The server's state holds it.
        update: ``(memory, context) -> memory`` after a round, from who took part and what they told; None: it never
            learns, and has no memory.
    """

    choose: Callable[..., Sequence[ClientId]]
    law: SamplingLaw | None = None
    initial_state: Mapping[str, np.ndarray] = MappingProxyType({})
    update: Callable[[State, Context], State] | None = None


def everyone() -> Selector:
    """Return a selector of all clients in each round."""
    return Selector(choose=lambda round, clients, rng: clients, law=SamplingLaw(kind="all"))


def uniform(clients_per_round: int | None) -> Selector:
    """Return a selector of cohorts of fixed size, drawn uniformly without replacement; None selects all clients.

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


def poisson(clients_per_round: float | None = None, *, rate: float | None = None) -> Selector:
    """Return a selector that takes each client independently with equal probability, as amplification by sampling
    assumes.

    Cohorts differ in size and may be empty.

    Args:
        clients_per_round: clients a round on average, > 0; the probability is this over the number of clients. Or
        rate: the probability, in (0, 1], however many clients there come to be.

    Raises:
        SettingError: not one of the two is given, or it is out of range; on the first round, if more clients are
            expected than there are.
    """
    if rate is None:
        positive = is_number(clients_per_round, at_least=0) and 0 < (clients_per_round or 0) < float("inf")
        require(positive, "clients_per_round", clients_per_round, "a finite number > 0", "clients_per_round=10")
    else:
        share = is_number(rate, at_least=0) and 0 < rate <= 1 and clients_per_round is None
        require(share, "rate", rate, "a share in (0, 1], in place of expected", "rate=0.01")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        chance = rate or 0.0
        if clients_per_round is not None:
            _require_enough(clients_per_round, len(clients), "the number of clients")
            chance = clients_per_round / len(clients)
        # a binomial number of clients, then who they are: the same law as a coin for each, in O(cohort)
        size = int(rng.binomial(len(clients), chance))
        return [clients[i] for i in rng.choice(len(clients), size, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="poisson", size=clients_per_round, rate=rate))


def min_separation(clients_per_round: int, separation: int) -> Selector:
    """Return a selector of cohorts of fixed size; a client that took part waits for at least ``separation`` rounds.

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


def round_robin(clients_per_round: int) -> Selector:
    """Return a selector that takes the next clients in order of their ids, and starts again after the last.

    Nothing is drawn, so that there is no law by which sampling would amplify privacy.

    Raises:
        SettingError: if ``clients_per_round`` is less than 1, or, on the first round, more than there are clients.
    """
    name = "clients_per_round"
    require(is_count(clients_per_round), name, clients_per_round, "a whole number >= 1", f"{name}=10")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        _require_enough(clients_per_round, len(clients), "the number of clients")
        first = (round - 1) * clients_per_round
        return [clients[i % len(clients)] for i in range(first, first + clients_per_round)]

    return Selector(choose=choose)


NO_CLIENT_VALUES = MappingProxyType(
    {"clients_N": np.zeros(0, np.int64), "value_N": np.zeros(0), "round_N": np.zeros(0, np.int64)}
)


def stateful_selector(
    choose: Callable[..., Sequence[ClientId]], client_values: Callable[[Context], np.ndarray]
) -> Selector:
    """Return a selector that stores a value of each client that took part, and the last round in which it did.

    Args:
        choose: ``(round, clients, rng, clients_N, value_N, round_N) -> cohort``; ``clients_N`` ascend.
        client_values: value of each responding client, from the context of a round; values that are not finite are
            ignored.
    """

    def learn(memory: State, context: Context) -> State:
        value_K = np.asarray(client_values(context), np.float64)
        told_K = np.isfinite(value_K)
        rounds_K = np.full(int(told_K.sum()), context.round, np.int64)
        new = {"clients_N": context.clients_K[told_K], "value_N": value_K[told_K], "round_N": rounds_K}
        return update_values(memory, new, key="clients_N")

    return Selector(choose=choose, initial_state=NO_CLIENT_VALUES, update=learn)


def training_loss(context: Context) -> np.ndarray:
    """Return the mean training loss of each client; NaN if a client did not send it."""
    return context.metrics.get("loss", np.full(len(context.clients_K), np.nan))


def weighted(clients_per_round: int) -> Selector:
    """Return a selector that draws without replacement, in proportion to the known numbers of training examples.

    One that has not taken part counts as the mean of those that have. Costs O(population).

    Raises:
        SettingError: if ``clients_per_round`` is less than 1, or, on the first round, more than there are clients.
    """
    name = "clients_per_round"
    require(is_count(clients_per_round), name, clients_per_round, "a whole number >= 1", f"{name}=10")

    def choose(
        round: int,
        clients: Sequence[ClientId],
        rng: np.random.Generator,
        clients_N: np.ndarray,
        value_N: np.ndarray,
        round_N: np.ndarray,
    ) -> Sequence[ClientId]:
        _require_enough(clients_per_round, len(clients), "the number of clients")
        weights = lookup_values(clients, clients_N, value_N, default=float(value_N.mean()) if len(value_N) else 1.0)
        drawn = rng.choice(len(clients), clients_per_round, replace=False, p=weights / weights.sum())
        return [clients[i] for i in drawn]

    return stateful_selector(choose, lambda context: context.num_examples_K)


def lookup_values(
    clients: Sequence[ClientId] | np.ndarray, clients_N: np.ndarray, value_N: np.ndarray, *, default: float
) -> np.ndarray:
    """Return the stored value of each client, or ``default`` if there is none. ``clients_N`` must ascend."""
    wanted = np.asarray(clients, np.int64)
    if not len(clients_N):
        return np.full(len(wanted), default)
    place = np.minimum(np.searchsorted(clients_N, wanted), len(clients_N) - 1)
    return np.where(clients_N[place] == wanted, value_N[place], default)


def update_values(state: State, new: State, *, key: str) -> State:
    """Return the stored values of all clients after those in ``new`` replaced the old values of their clients.

    Args:
        state: arrays of one length by name.
        new: the same, of some clients in any order.
        key: the name of the clients themselves, which ascend in the result.
    """
    old_N = ~np.isin(state[key], new[key])
    joined = {name: np.concatenate([state[name][old_N], new[name]]) for name in state}
    order_N = np.argsort(joined[key])
    return {name: values_N[order_N] for name, values_N in joined.items()}


SELECTORS: Mapping[str, Callable[[int], Selector]] = MappingProxyType(
    {"uniform": uniform, "poisson": poisson, "weighted": weighted, "round_robin": round_robin}
)


def get_selector(kind: str, clients_per_round: int | None) -> Selector:
    """Return a selector by name: ``uniform``, ``poisson``, ``weighted`` or ``round_robin``; None as size selects all
    clients.

    Raises:
        SettingError: there is no such selector, or it does not take that number of clients.
    """
    require(kind in SELECTORS, "select", kind, f"one of {', '.join(SELECTORS)}", "select=uniform")
    return everyone() if clients_per_round is None else SELECTORS[kind](clients_per_round)


def _require_enough(asked: float, available: int, what: str) -> None:
    name = "strategy.clients_per_round"
    if asked > available:
        raise SettingError(name, asked, f"at most {available}, {what}", f"{name}={available}")
