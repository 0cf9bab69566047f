"""What a protected strategy carries through the loop: how to charge a round, and what is promised so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlearn.core.privacy_ledger import Epsilon, Ledger

DEFAULT_WITHHELD = frozenset({"metrics", "examples"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What one round lets out, as far as a ledger must know.

    Attributes:
        round: from 1.
        clients: who delivers; before the round, who is asked.
        examples, steps: training examples and local steps of each; None before the round.
        dropouts: clients whose reply did not arrive though they may have sent it; they count as having delivered.
    """

    round: int
    clients: tuple[int, ...]
    num_examples: tuple[int, ...] | None = None
    num_steps: tuple[int, ...] | None = None
    dropouts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrivacyGuarantee:
    """A promise, and how it is kept account of.

    Attributes:
        charge: ``(ledger, release) -> ledger``. Asked before a round with what it may cost at most, and after it with
            what it did; a round that released nothing is not charged.
        epsilon_of: epsilon of a ledger; None where nothing of the kind is promised.
        description: the promise as JSON values: ``kind``, ``unit``, ``adjacency``, ``sampling``, ``delta``, mechanism
            settings, ``not_covered`` and ``warnings``. What a report says comes from here.
        max_epsilon: epsilon that no round may pass; None for no limit.
        withheld: what stays at the clients because no noise covers it: ``metrics`` of training, and their numbers of
            ``examples``.
        initial_ledger: what was paid before the first round: the ledger that a run starts with.
        supports_empty_rounds: whether a round without clients is a round all the same, which releases noise.
    """

    charge: Callable[[Ledger, Release], Ledger]
    epsilon_of: Callable[[Ledger], Epsilon | None]
    description: Mapping[str, Any]
    max_epsilon: float | None = None
    withheld: frozenset[str] = DEFAULT_WITHHELD
    initial_ledger: Ledger = field(default_factory=Ledger)
    supports_empty_rounds: bool = False

    def refusal_reason(self, ledger: Ledger, release: Release) -> str | None:
        """Why a round must not happen: it would overspend. None if it may."""
        if self.max_epsilon is None:
            return None
        before, after = self.epsilon_of(ledger), self.epsilon_of(self.charge(ledger, release))
        if before is None or after is None or after.value <= self.max_epsilon:
            return None
        now, delta = before.value, self.description["delta"]
        would = f"round {release.round} would bring epsilon to {after.value:.4g}"
        return f"{would}, above privacy.epsilon={self.max_epsilon:g} at delta {delta:g} (now {now:.4g})"
