"""Charge the privacy ledger before a round, if the server itself is an adversary.

Such a guarantee protects the uploads of real clients. The server has them as soon as they arrive, even if the round
fails or the coordinator is killed. So the cost of the whole cohort is written before any request goes out. After the
round, only the cost of clients that provably sent nothing is refunded. A resumed run starts with the written ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import ClientId
from fedlearn.loop.protocols import Engine


class LedgerJournal(Protocol):
    """Keep the newest ledger of a run outside its checkpoints."""

    def record(self, ledger: Ledger) -> None:
        """Write the ledger, so that a crash after the return does not lose it."""
        ...


def charges_ahead(strategy: Strategy, engine: Engine) -> bool:
    """Return whether the cost of a round is charged before its requests go out."""
    guarantee = strategy.privacy_guarantee
    return engine.deployed and guarantee is not None and guarantee.holds_against_server


def planned_release(round: int, cohort: Sequence[ClientId]) -> Release:
    """Return the largest possible release of a round."""
    return Release(round=round, clients=tuple(cohort))


def actual_release(round: int, partial: PartialAggregate, cohort: Sequence[ClientId] = ()) -> Release:
    """Return the values that clients released in a round.

    A client that failed before sending released nothing. A lost response counts as released, because somebody may have
    read it.

    Args:
        round: number of the round.
        partial: results of the clients so far.
        cohort: clients that may have no result yet, because the round failed; they count as released.
    """
    silent = {failure.client for failure in partial.failures if not failure.may_have_released}
    lost = {failure.client for failure in partial.failures if failure.may_have_released}
    lost |= set(cohort) - silent
    return Release(
        round=round,
        clients=partial.clients,
        num_examples=partial.num_examples_per_client,
        num_steps=partial.num_steps_per_client,
        dropouts=tuple(sorted(lost - set(partial.clients))),
    )
