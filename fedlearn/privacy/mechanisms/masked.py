"""Updates that only their sum shows: secure aggregation alone, and with noise that clients add together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fedlearn.masking import Masking
from fedlearn.masking import distributed as noisy_masking
from fedlearn.masking import secagg as masking
from fedlearn.privacy.accounting import largest
from fedlearn.privacy.ledger import Event, Ledger, Spent, spent
from fedlearn.privacy.mechanism import (
    EVALUATION,
    FAILURES,
    Budget,
    Mechanism,
    Population,
    refuse_example_dp,
    refuse_unequal_weights,
    refuse_what_leaves_beside,
    warnings,
    with_protection,
)
from fedlearn.privacy.protection import Protection, Release
from fedlearn.records import LocalSettings
from fedlearn.strategy import Strategy

SMALLEST = 1e-3  # noise multiplier with which settings are checked before the real one is known


def secagg(
    *,
    clip_norm: float = 10.0,
    bits: int = 20,
    threshold: int | None = None,
    cohort: int | None = None,
    modulus_bits: int = 32,
    protocol: str = "sum",
) -> Mechanism:
    """The server sees sums of updates; see `fedlearn.masking.secagg`, whose settings these are.

    *Guarantees*: none of differential privacy. What the sum gives away, it gives away.
    """
    masked = masking(
        clip_norm=clip_norm,
        bits=bits,
        threshold=threshold,
        cohort=cohort,
        modulus_bits=modulus_bits,
        protocol=protocol,
    )
    return Mechanism(refuse=partial(_refuse, "secagg"), protect=partial(_mask, masked), kind="secagg")


def distributed(
    *,
    clip_norm: float = 1.0,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float = 1e-5,
    noise: str = "skellam",
    bits: int = 14,
    threshold: int | None = None,
    cohort: int | None = None,
    modulus_bits: int = 32,
    flatten: float = 1.0,
    protocol: str = "sum",
) -> Mechanism:
    """Clients' own integer noise adds up, under secure aggregation, to that of a central mechanism.

    Args:
        clip_norm: as in `fedlearn.masking.distributed`, like all that is not named here.
        noise_multiplier: of the noise in the smallest sum that may be opened, > 0; None: what ``epsilon`` takes for the
            planned rounds.
        epsilon: the run stops before a client passes this; None: no limit.
        delta: in (0, 1), below 1 over the number of clients.
        noise: ``skellam`` or ``discrete_gaussian``.
        bits: of one parameter of one client.
        threshold: the fewest clients whose sum may be opened.
        cohort: clients that a round asks, at most.
        modulus_bits: of the integers that travel.
        flatten: above 1, updates are rotated.
        protocol: ``sum``, or ``full`` for the real protocol.

    *Guarantees*: (epsilon, delta) for one client's update there or zero, against everyone who sees sums, the server
    included; accounted by Renyi divergences at whole orders, without amplification (the server knows who took part),
    each client for the rounds that it took part in. The ledger tells the largest.
    """
    budget = Budget(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    masked = noisy_masking(
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier or SMALLEST,
        noise=noise,
        bits=bits,
        threshold=threshold,
        cohort=cohort,
        modulus_bits=modulus_bits,
        flatten=flatten,
        protocol=protocol,
    )
    return Mechanism(
        refuse=partial(_refuse, "distributed"), protect=partial(_noise, masked, budget), kind="distributed"
    )


def _refuse(kind: str, strategy: Strategy, local: LocalSettings) -> None:
    refuse_example_dp(local, kind)
    refuse_unequal_weights(strategy, kind)
    refuse_what_leaves_beside(strategy, kind)


def _mask(
    masked: Masking, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    size = masked.cohort_of(strategy, population.num_clients)
    quorum = masked.threshold_of(size)
    promise = Protection(
        charge=lambda ledger, release: ledger,
        spent=lambda ledger: None,
        facts=_facts(masked, size, kind="secagg", adjacency=f"only sums of {quorum} clients or more can be opened"),
    )
    return with_protection(masked.protect(strategy, num_clients=population.num_clients), protection=promise), local


def _noise(
    masked: Masking, budget: Budget, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    size = masked.cohort_of(strategy, population.num_clients)

    def event_of(noise: float) -> Event:
        return Event(replace(masked, noise_multiplier=noise).sum_of(size).gaussian, "renyi")

    def planned(noise: float) -> Sequence[Spent]:
        return [spent({event_of(noise): population.rounds})]

    noise = budget.noise(planned)
    masked, event = replace(masked, noise_multiplier=noise), event_of(noise)

    def charge(ledger: Ledger, release: Release) -> Ledger:
        return ledger.charged_clients(dict.fromkeys((*release.clients, *release.lost), (event, 1)))

    facts = _facts(masked, size, kind="distributed", adjacency="one client's update, or zero in its place")
    promise = Protection(
        charge=charge,
        spent=lambda ledger: largest(ledger.histories, delta=budget.delta),
        budget=budget.epsilon,
        facts={
            **facts,
            "delta": budget.delta,
            "noise_multiplier": noise,
            "budget": budget.epsilon,
            "warnings": warnings(budget.delta, population.num_clients),
        },
    )
    return with_protection(masked.protect(strategy, num_clients=population.num_clients), protection=promise), local


def _facts(masked: Masking, size: int, *, kind: str, adjacency: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "unit": "client",
        "adjacency": adjacency,
        "sampling": "none assumed",
        "delta": None,
        "noise_multiplier": None,
        "clip_norm": masked.clip_norm,
        "clip": "fixed",
        "budget": None,
        "threshold": masked.threshold_of(size),
        "withheld": "training metrics and example counts",
        "not_covered": [EVALUATION, FAILURES, "the sums themselves" if masked.noise is None else "who takes part"],
        "warnings": [],
    }
