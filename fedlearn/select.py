"""Which clients take part in a round.

Shapes: none; a selector costs O(cohort), not O(population).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fedlearn.errors import SettingError, is_count, require
from fedlearn.records import ClientId


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingLaw:
    """What a privacy ledger may assume of a selector.

    Attributes:
        kind: ``all`` clients each round, or a ``fixed_size`` cohort drawn uniformly without replacement.
        size: of the cohort, for ``fixed_size``.
    """

    kind: Literal["all", "fixed_size"]
    size: int | None = None


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
        if clients_per_round > len(clients):
            size = len(clients)
            raise SettingError(
                f"strategy.{name}",
                clients_per_round,
                f"at most {size}, the number of clients",
                f"strategy.{name}={size}",
            )
        return [clients[i] for i in rng.choice(len(clients), clients_per_round, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="fixed_size", size=clients_per_round))
