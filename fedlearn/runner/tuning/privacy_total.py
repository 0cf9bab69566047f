"""Compute the privacy loss of all runs of a tuning together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlearn.core.privacy_ledger import EventHistory, Ledger, event_history
from fedlearn.errors import FedlearnError
from fedlearn.privacy.accounting import max_epsilon_bounds

LEDGER_FILE = "tuning_ledger.json"  # in the folder of each run


@dataclass(frozen=True)
class PrivacyTotal:
    """Privacy loss of all runs of a tuning.

    Attributes:
        epsilon: bound on epsilon of all runs together.
        delta: delta of the bound.
        rule: ``composition`` of all releases, or ``sum`` of the epsilons of the runs.
        num_runs: number of runs with releases.
    """

    epsilon: float
    delta: float
    rule: str
    num_runs: int


def read_ledgers(folder: Path) -> list[Ledger]:
    """Return the ledgers of all runs below a folder, interrupted runs included.

    Raises:
        FedlearnError: a ledger is damaged, so that the privacy loss is unknown.
    """
    return [_read(path) for path in sorted(folder.glob(f"*/{LEDGER_FILE}"))]


def total_privacy(ledgers: Sequence[Ledger], *, delta: float) -> PrivacyTotal:
    """Return the privacy loss of several runs on the same data.

    If all runs have the same kinds of releases, all releases are composed at ``delta``. If the noise or the sampling
    differs between runs, the search chose them from earlier results. Basic composition covers such a choice: the
    result is the sum of the epsilons, each at an equal share of ``delta``.

    Args:
        ledgers: ledgers of the runs.
        delta: delta of the whole tuning, in (0, 1).

    Reference: Dwork, Roth, *The Algorithmic Foundations of Differential Privacy*, 2014, theorem 3.16; Rogers, Roth,
    Ullman, Vadhan, *Privacy Odometers and Filters*, NeurIPS 2016, for parameters that depend on earlier results.
    """
    charged = [ledger for ledger in ledgers if ledger.federation or ledger.clients]
    if not charged:
        return PrivacyTotal(0.0, delta, "composition", 0)
    kinds = {_kinds_of_releases(ledger) for ledger in charged}
    together = _epsilon(_combined(charged), delta) if len(kinds) == 1 else float("inf")
    apart = sum(_epsilon(ledger, delta / len(charged)) for ledger in charged)
    rule, epsilon = ("composition", together) if together <= apart else ("sum", apart)
    return PrivacyTotal(epsilon, delta, rule, len(charged))


def _read(path: Path) -> Ledger:
    try:
        return Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        fix = "restore a backup of this file, or start a new tuning"
        raise FedlearnError(
            f"{path} cannot be read: {error}\n  expected  a privacy ledger\n  advice    {fix}"
        ) from error


def _kinds_of_releases(ledger: Ledger) -> frozenset[object]:
    """Return the distinct events of all parties, without their counts."""
    return frozenset(event for history in (ledger.federation, *ledger.histories) for event, _ in history)


def _combined(ledgers: Sequence[Ledger]) -> Ledger:
    """Return one ledger with the releases of all runs."""
    federation = _sum([ledger.federation for ledger in ledgers])
    clients = sorted({client for ledger in ledgers for client in ledger.clients})
    histories = [_sum([ledger.client_history(client) for ledger in ledgers]) for client in clients]
    return Ledger(federation, tuple(histories), {client: number for number, client in enumerate(clients)})


def _epsilon(ledger: Ledger, delta: float) -> float:
    """Return the largest epsilon of a client, which pays for its releases and the releases of the federation."""
    histories = [_sum([ledger.federation, history]) for history in ledger.histories or ((),)]
    return max_epsilon_bounds(histories, delta=delta).value


def _sum(histories: Sequence[EventHistory]) -> EventHistory:
    counts: dict[object, int] = {}
    for history in histories:
        for event, count in history:
            counts[event] = counts.get(event, 0) + count
    return event_history(counts)
