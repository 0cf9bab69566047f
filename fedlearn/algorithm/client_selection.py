"""Selection of the clients that take part in a round.

Shapes: K clients in a cohort, N clients that took part before. A selector costs O(cohort), not O(population). A
selector with a state also costs O(N).
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
    """Describe the sampling law of a selector, for the privacy ledger.

    Attributes:
        kind: ``all`` selects all clients in each round. ``fixed_size`` draws a cohort uniformly without replacement.
            ``poisson`` draws each client independently with equal probability. ``min_separation`` draws a cohort of
            fixed size, and a client waits for ``separation`` rounds before it takes part again.
        size: size of the cohort; expected size for ``poisson``.
        rate: probability of each client, for ``poisson`` with a fixed probability instead of a fixed expected size.
        separation: number of rounds, for ``min_separation``.
    """

    kind: Literal["all", "fixed_size", "poisson", "min_separation"]
    size: float | None = None
    rate: float | None = None
    separation: int | None = None


class Selector(NamedTuple):
    """Select the cohort of each round.

    Attributes:
        choose: returns the cohort, ``(round, clients, rng, **state) -> cohort``.
        law: sampling law for the privacy ledger; None if there is none.
        initial_state: state before the first round: named arrays. The server state contains it.
        update: returns the state after a round, ``(state, context) -> state``. It uses the responding clients and their
            metrics. None: the selector has no state.
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
        SettingError: ``clients_per_round`` is less than 1, or (in the first round) above the number of clients.
    """
    if clients_per_round is None:
        return everyone()
    name, expected = "clients_per_round", "null (all clients), or a whole number >= 1"
    require(is_count(clients_per_round), name, clients_per_round, expected, f"{name}=10")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        _require_enough(clients_per_round, len(clients), "the number of clients")
        return [clients[i] for i in rng.choice(len(clients), clients_per_round, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="fixed_size", size=clients_per_round))


def poisson(clients_per_round: float | None = None, *, rate: float | None = None) -> Selector:
    """Return a selector that draws each client independently with equal probability.

    Privacy amplification by sampling assumes this law. Cohorts differ in size and may be empty. Give one of the two
    arguments.

    Args:
        clients_per_round: expected size of a cohort, > 0. The probability is this number over the number of clients.
        rate: probability of each client, in (0, 1].

    Raises:
        SettingError: both or none of the arguments are given, or the value is out of range. In the first round:
            ``clients_per_round`` is above the number of clients.
    """
    if rate is None:
        positive = is_number(clients_per_round, at_least=0) and 0 < (clients_per_round or 0) < float("inf")
        require(positive, "clients_per_round", clients_per_round, "a finite number > 0", "clients_per_round=10")
    else:
        is_share = is_number(rate, at_least=0) and 0 < rate <= 1 and clients_per_round is None
        require(is_share, "rate", rate, "a share in (0, 1], without clients_per_round", "rate=0.01")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        probability = rate or 0.0
        if clients_per_round is not None:
            _require_enough(clients_per_round, len(clients), "the number of clients")
            probability = clients_per_round / len(clients)
        # draw the size, then the clients: the same law as one draw per client, in O(cohort)
        size = int(rng.binomial(len(clients), probability))
        return [clients[i] for i in rng.choice(len(clients), size, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="poisson", size=clients_per_round, rate=rate))


def min_separation(clients_per_round: int, separation: int) -> Selector:
    """Return a selector of cohorts of fixed size. After its round, a client waits for at least ``separation`` rounds.

    Round t draws uniformly from the clients with an id of t modulo ``separation``. So the selector needs no state, and
    the rule also holds for resumed runs.

    Raises:
        SettingError: a number is less than 1, or (in a round) too few clients have such an id.
    """
    size, wait = clients_per_round, separation
    require(is_count(size), "clients_per_round", size, "a whole number >= 1", "clients_per_round=10")
    require(is_count(wait), "separation", wait, "a whole number of rounds >= 1", "separation=10")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        turn = round % wait
        is_plain_range = isinstance(clients, range) and clients.start == 0 and clients.step == 1
        candidates: Sequence[ClientId] = (
            clients[turn::wait] if is_plain_range else [c for c in clients if c % wait == turn]
        )
        _require_enough(size, len(candidates), f"the number of candidates in a round (one client in {wait})")
        return [candidates[i] for i in rng.choice(len(candidates), size, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="min_separation", size=size, separation=wait))


def round_robin(clients_per_round: int) -> Selector:
    """Return a selector that takes the next clients in order of their ids, and then starts again.

    Nothing is drawn at random, so there is no sampling law and no privacy amplification.

    Raises:
        SettingError: ``clients_per_round`` is less than 1, or (in the first round) above the number of clients.
    """
    name = "clients_per_round"
    require(is_count(clients_per_round), name, clients_per_round, "a whole number >= 1", f"{name}=10")

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        _require_enough(clients_per_round, len(clients), "the number of clients")
        first = (round - 1) * clients_per_round
        return [clients[i % len(clients)] for i in range(first, first + clients_per_round)]

    return Selector(choose=choose)


def cyclic(clients_per_round: int) -> Selector:
    """Return a selector that takes each client once per cycle, in a new random order in each cycle.

    It draws uniformly from the clients with the fewest completed rounds. With one client per round, the model visits
    the clients one after another (cyclic weight transfer). There is no sampling law.

    Raises:
        SettingError: ``clients_per_round`` is less than 1, or (in the first round) above the number of clients.

    References:
        Chang et al., *Distributed deep learning networks among institutions for medical imaging*, JAMIA 25(8), 2018.
    """
    name = "clients_per_round"
    require(is_count(clients_per_round), name, clients_per_round, "a whole number >= 1", f"{name}=1")

    def choose(
        round: int,
        clients: Sequence[ClientId],
        rng: np.random.Generator,
        clients_N: np.ndarray,
        num_rounds_N: np.ndarray,
    ) -> Sequence[ClientId]:
        _require_enough(clients_per_round, len(clients), "the number of clients")
        num_rounds = lookup_values(clients, clients_N, num_rounds_N, default=0)
        shuffled = rng.permutation(len(clients))
        return [clients[i] for i in shuffled[np.argsort(num_rounds[shuffled], kind="stable")][:clients_per_round]]

    def update(state: State, context: Context) -> State:
        before_K = lookup_values(context.clients_K, state["clients_N"], state["num_rounds_N"], default=0)
        new = {"clients_N": np.asarray(context.clients_K, np.int64), "num_rounds_N": before_K.astype(np.int64) + 1}
        return update_values(state, new, key="clients_N")

    nobody = {"clients_N": np.zeros(0, np.int64), "num_rounds_N": np.zeros(0, np.int64)}
    return Selector(choose=choose, initial_state=MappingProxyType(nobody), update=update)


NO_CLIENT_VALUES = MappingProxyType(
    {"clients_N": np.zeros(0, np.int64), "value_N": np.zeros(0), "round_N": np.zeros(0, np.int64)}
)


def stateful_selector(
    choose: Callable[..., Sequence[ClientId]], client_values: Callable[[Context], np.ndarray]
) -> Selector:
    """Return a selector that stores a value of each responding client, and the client's last round.

    Args:
        choose: returns the cohort, ``(round, clients, rng, clients_N, value_N, round_N) -> cohort``. ``clients_N`` are
            in ascending order.
        client_values: returns the value of each responding client, ``(context) -> value_K``. Values that are not finite
            are ignored.
    """

    def update(state: State, context: Context) -> State:
        value_K = np.asarray(client_values(context), np.float64)
        valid_K = np.isfinite(value_K)
        rounds_K = np.full(int(valid_K.sum()), context.round, np.int64)
        new = {"clients_N": context.clients_K[valid_K], "value_N": value_K[valid_K], "round_N": rounds_K}
        return update_values(state, new, key="clients_N")

    return Selector(choose=choose, initial_state=NO_CLIENT_VALUES, update=update)


def training_loss(context: Context) -> np.ndarray:
    """Return the mean training loss of each client; NaN if a client did not send it."""
    return context.metrics.get("loss", np.full(len(context.clients_K), np.nan))


def weighted(clients_per_round: int) -> Selector:
    """Return a selector that draws without replacement, in proportion to the number of training examples.

    The number is known for clients that took part before. All others count as the mean of the known numbers. A draw
    costs O(population).

    Raises:
        SettingError: ``clients_per_round`` is less than 1, or (in the first round) above the number of clients.
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
    """Return the stored value of each client, or ``default``. ``clients_N`` must be in ascending order."""
    wanted = np.asarray(clients, np.int64)
    if not len(clients_N):
        return np.full(len(wanted), default)
    place = np.minimum(np.searchsorted(clients_N, wanted), len(clients_N) - 1)
    return np.where(clients_N[place] == wanted, value_N[place], default)


def update_values(state: State, new: State, *, key: str) -> State:
    """Return the stored values of all clients, with the values in ``new`` instead of older ones.

    Args:
        state: arrays of equal length, by name.
        new: arrays of some clients, by the same names, in any order of clients.
        key: name of the array of client ids; the result is in ascending order of ids.
    """
    unchanged_N = ~np.isin(state[key], new[key])
    joined = {name: np.concatenate([state[name][unchanged_N], new[name]]) for name in state}
    order_N = np.argsort(joined[key])
    return {name: values_N[order_N] for name, values_N in joined.items()}


SELECTORS: Mapping[str, Callable[[int], Selector]] = MappingProxyType(
    {"uniform": uniform, "poisson": poisson, "weighted": weighted, "round_robin": round_robin, "cyclic": cyclic}
)


def get_selector(kind: str, clients_per_round: int | None) -> Selector:
    """Return a selector by name: ``uniform``, ``poisson``, ``weighted``, ``round_robin`` or ``cyclic``.

    Without ``clients_per_round`` it selects all clients.

    Raises:
        SettingError: the name is unknown, or ``clients_per_round`` is out of range.
    """
    require(kind in SELECTORS, "select", kind, f"one of {', '.join(SELECTORS)}", "select=uniform")
    return everyone() if clients_per_round is None else SELECTORS[kind](clients_per_round)


def _require_enough(size: float, available: int, description: str) -> None:
    name = "strategy.clients_per_round"
    if size > available:
        raise SettingError(name, size, f"at most {available}, {description}", f"{name}={available}")
