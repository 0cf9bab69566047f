"""Compute the privacy loss of all runs of a tuning together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlearn.core.privacy_ledger import AnyEvent, EventHistory, Ledger, event_history
from fedlearn.errors import FedlearnError
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.runner.resume import SUMMARY_FILE

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


@dataclass(frozen=True)
class Charge:
    """Releases of one run.

    Attributes:
        ledger: releases of the run.
        is_complete: False for a run that failed or was interrupted, so that releases are missing.
    """

    ledger: Ledger
    is_complete: bool = True


def read_charges(folder: Path) -> list[Charge]:
    """Return the releases of all runs below a folder, interrupted runs included.

    Raises:
        FedlearnError: a ledger is damaged, so that the privacy loss is unknown.
    """
    paths = sorted(folder.glob(f"*/{LEDGER_FILE}"))
    return [Charge(_read(path), _is_complete(path.with_name(SUMMARY_FILE))) for path in paths]


def total_privacy(charges: Sequence[Charge], *, delta: float) -> PrivacyTotal:
    """Return the privacy loss of several runs on the same data.

    If all complete runs have the same releases, all releases are composed at ``delta``. An incomplete run then counts
    as a complete run. If the releases differ, the search chose noise, sampling or their number from earlier results.
    Basic composition covers such a choice: the result is the sum of the epsilons, each at an equal share of ``delta``.

    Args:
        charges: releases of the runs.
        delta: delta of the whole tuning, in (0, 1).

    Reference: Dwork, Roth, *The Algorithmic Foundations of Differential Privacy*, 2014, theorem 3.16; Rogers, Roth,
    Ullman, Vadhan, *Privacy Odometers and Filters*, NeurIPS 2016, for parameters that depend on earlier results.
    """
    charged = [charge for charge in charges if charge.ledger.federation or charge.ledger.clients]
    if not charged:
        return PrivacyTotal(0.0, delta, "composition", 0)
    whole = _common_ledger(charged)
    together = float("inf") if whole is None else _epsilon(_repeated(whole, len(charged)), delta)
    apart = sum(_epsilon(charge.ledger, delta / len(charged)) for charge in charged)
    rule, epsilon = ("composition", together) if together <= apart else ("sum", apart)
    return PrivacyTotal(epsilon, delta, rule, len(charged))


def _common_ledger(charges: Sequence[Charge]) -> Ledger | None:
    """Return the ledger of all complete runs, if they have one, and if no incomplete run has more releases."""
    complete = [charge.ledger for charge in charges if charge.is_complete]
    if not complete or any(_parties(ledger) != _parties(complete[0]) for ledger in complete):
        return None
    limits = _parties(complete[0])
    for charge in charges:
        for party, counts in _parties(charge.ledger).items():
            if any(count > limits.get(party, {}).get(event, 0) for event, count in counts.items()):
                return None
    return complete[0]


def _parties(ledger: Ledger) -> dict[int | None, dict[AnyEvent, int]]:
    """Return the number of releases of each kind, for the federation (None) and for each client."""
    return {None: dict(ledger.federation), **{each: dict(ledger.client_history(each)) for each in ledger.clients}}


def _is_complete(summary: Path) -> bool:
    try:
        return json.loads(summary.read_text(encoding="utf-8"))["status"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(path: Path) -> Ledger:
    try:
        return Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        fix = "restore a backup of this file, or start a new tuning"
        raise FedlearnError(
            f"{path} cannot be read: {error}\n  expected  a privacy ledger\n  advice    {fix}"
        ) from error


def _repeated(ledger: Ledger, times: int) -> Ledger:
    """Return the ledger of several runs with the same releases."""
    groups = tuple(_times(history, times) for history in ledger.groups)
    return Ledger(_times(ledger.federation, times), groups, ledger.clients)


def _times(history: EventHistory, times: int) -> EventHistory:
    return event_history({event: times * count for event, count in history})


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
