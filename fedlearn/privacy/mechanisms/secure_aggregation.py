"""Updates that only their sum shows: secure aggregation alone, and with noise that clients add together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import WHOLE_ORDERS, EventHistory, Ledger, RenyiEvent, event_history
from fedlearn.core.records import LocalSettings
from fedlearn.errors import require
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.privacy.mechanisms.base import (
    EVALUATION_NOT_COVERED,
    FAILURES_NOT_COVERED,
    Mechanism,
    NoiseCalibration,
    Population,
    delta_warnings,
    refuse_example_dp,
    refuse_extra_uploads,
    refuse_unequal_weights,
    replace_parts,
)
from fedlearn.privacy.secagg.masked_sum import NOISES, Masking

PROVISIONAL_NOISE_MULTIPLIER = 1e-3  # noise multiplier with which settings are checked before the real one is known


def secagg(
    *,
    clip_norm: float = 10.0,
    bits: int = 20,
    threshold: int | None = None,
    cohort: int | None = None,
    modulus_bits: int = 32,
    protocol: str = "sum",
) -> Mechanism:
    """Return secure aggregation: the server learns the mean of the updates of a cohort, and nothing more about them.

    Args:
        clip_norm: L2 bound on an update, > 0; longer updates are scaled down. It also sets the scale of the integers.
        bits: of one parameter of one client, sign included; rounding is to the nearest multiple of
            ``clip_norm / 2**(bits - 1)``.
        threshold: the fewest clients whose sum may be opened, more than half of the cohort; None takes the smallest
            such number. A round with fewer is lost.
        cohort: clients that a round asks, at most; None takes it from the strategy.
        modulus_bits: of the integers that travel: 16, 32 or 64.
        protocol: in a simulation, ``sum`` adds integers without masks, ``full`` runs the real protocol. The sum is the
            same, bit for bit.

    *Guarantees*: the sum is exact; settings with which it could wrap around are refused; every client that delivers
    counts the same. There is no differential privacy: the mean itself may tell about a client.

    Raises:
        SettingError: a setting is out of range, or sums could wrap around.
        MissingExtra: ``protocol=full`` without the cryptography it needs.

    Reference: Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning*, CCS 2017.
    """
    masked = Masking(
        clip_norm=clip_norm,
        bits=bits,
        threshold=threshold,
        cohort=cohort,
        modulus_bits=modulus_bits,
        protocol=protocol,
    )
    return Mechanism(validate=partial(_refuse, "secagg"), protect=partial(_mask, masked), kind="secagg")


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
    """Return distributed differential privacy: under secure aggregation, the noise of the clients adds up to central
    noise.

    Each client clips to ``clip_norm``, rounds at random under a bound on the norm, and adds integer noise of
    ``noise_multiplier * bound / sqrt(threshold)``: the noise in the smallest sum that may be opened is enough.

    Args:
        clip_norm: as in `secagg`.
        noise_multiplier: standard deviation of the noise in the sum of ``threshold`` clients, over the bound, > 0;
            None: what ``epsilon`` takes for the planned rounds.
        epsilon: the run stops before a client passes this; None: no limit.
        delta: in (0, 1), below 1 over the number of clients.
        noise: ``skellam`` or ``discrete_gaussian``.
        bits: as in `secagg`; rounding is random, and right on average. 14 serve models of up to five million
            parameters, each bit more four times as many; noise is coarser than either.
        threshold: as in `secagg`.
        cohort: as in `secagg`; also the divisor of the sum, for any number of answers.
        modulus_bits: as in `secagg`.
        flatten: 1 for none; more rotates updates at random, so that each parameter is at most ``clip_norm / flatten``
            but for an event of probability 1e-9 (the rest is cut off), and as many bits make a scale so much finer.
        protocol: as in `secagg`.

    *Guarantees*: any sum that can be opened is differentially private against all who see it, server included, for
    one client's update, or zero in its place. On real nodes noise comes from the operating system's entropy. Renyi
    divergences at whole orders give the cost, without amplification: the server knows the cohort. Each client pays for
    the rounds that it took part in; the ledger tells the largest cost.

    Raises:
        SettingError: a setting is out of range; or, when applied to a strategy, a client's noise would be below one
            integer or beyond what can be drawn, or sums could wrap around.
        MissingExtra: the cryptography for random numbers is not installed.

    References: Kairouz, Liu, Steinke, *The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation*, ICML 2021, arXiv:2102.06387; Agarwal, Kairouz, Liu, *The Skellam Mechanism for Differentially Private
    Federated Learning*, NeurIPS 2021, arXiv:2110.04995.
    """
    budget = NoiseCalibration(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    require(noise in NOISES, "noise", noise, f"one of {', '.join(NOISES)}", "noise=skellam")
    masked = Masking(
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier or PROVISIONAL_NOISE_MULTIPLIER,
        noise=noise,
        bits=bits,
        threshold=threshold,
        cohort=cohort,
        modulus_bits=modulus_bits,
        flatten=flatten,
        protocol=protocol,
    )
    return Mechanism(
        validate=partial(_refuse, "distributed"), protect=partial(_noise, masked, budget), kind="distributed"
    )


def _refuse(kind: str, strategy: Strategy, local: LocalSettings) -> None:
    refuse_example_dp(local, kind)
    refuse_unequal_weights(strategy, kind)
    refuse_extra_uploads(strategy, kind)


def _mask(
    masked: Masking, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    size = masked.cohort_size(strategy, population.num_clients)
    quorum = masked.threshold_of(size)
    promise = PrivacyGuarantee(
        kind="secagg",
        adjacency=f"only sums of {quorum} clients or more can be opened",
        charge=lambda ledger, release: ledger,
        epsilon_of=lambda ledger: None,
        **_shared_parts(masked, size),
    )
    return replace_parts(masked.protect(strategy, num_clients=population.num_clients), privacy_guarantee=promise), local


def _noise(
    masked: Masking, budget: NoiseCalibration, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    size = masked.cohort_size(strategy, population.num_clients)

    def event_of(noise: float) -> RenyiEvent:
        """Return the divergences of whole orders, which are proved to be at most those of this Gaussian noise."""
        z = replace(masked, noise_multiplier=noise).smallest_noisy_sum(size).equivalent_noise_multiplier
        return RenyiEvent(WHOLE_ORDERS, tuple(order / (2 * z**2) for order in WHOLE_ORDERS))

    def planned(noise: float) -> Sequence[EventHistory]:
        return [event_history({event_of(noise): population.rounds})]

    noise = budget.resolve_noise_multiplier(planned)
    masked, event = replace(masked, noise_multiplier=noise), event_of(noise)

    def charge(ledger: Ledger, release: Release) -> Ledger:
        return ledger.charge_clients(dict.fromkeys((*release.clients, *release.dropouts), (event, 1)))

    promise = PrivacyGuarantee(
        kind="distributed",
        adjacency="one client's update, or zero in its place",
        charge=charge,
        epsilon_of=lambda ledger: max_epsilon_bounds(ledger.histories, delta=budget.delta),
        max_epsilon=budget.epsilon,
        delta=budget.delta,
        noise_multiplier=noise,
        warnings=tuple(delta_warnings(budget.delta, population.num_clients)),
        **_shared_parts(masked, size),
    )
    return replace_parts(masked.protect(strategy, num_clients=population.num_clients), privacy_guarantee=promise), local


def _shared_parts(masked: Masking, size: int) -> dict[str, Any]:
    revealed = "the sums themselves" if masked.noise is None else "who takes part"
    return {
        "unit": "client",
        "clip_norm": masked.clip_norm,
        "threshold": masked.threshold_of(size),
        "not_covered": (EVALUATION_NOT_COVERED, FAILURES_NOT_COVERED, revealed),
    }
