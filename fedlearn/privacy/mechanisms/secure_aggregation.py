"""Secure aggregation, which shows only the sum of the updates, with or without noise from the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import (
    FRACTIONAL_ORDERS,
    WHOLE_ORDERS,
    EventHistory,
    Ledger,
    RenyiEvent,
    event_history,
)
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

PROVISIONAL_NOISE_MULTIPLIER = 1e-3  # for the check of the settings, before the noise is calibrated


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
        bits: bits of one parameter of one client, including the sign, in [2, 48]. Values are rounded to the nearest
            multiple of ``clip_norm / 2**(bits - 1)``.
        threshold: smallest number of parties in a sum that may be opened, more than half of the parties of a cohort;
            None for the smallest number above ``(parties + 1) / 2``. A round with fewer parties fails. In a deployment
            a party is a node, with one or more clients; in a simulation each client is a party.
        cohort: largest number of clients per round, >= 2; None for the number of the strategy.
        modulus_bits: bits of the transmitted integers: 16, 32 or 64.
        protocol: in a simulation, ``sum`` adds integers without masks; ``full`` runs the real protocol. Both give the
            same sum, bit for bit.

    *Guarantees*: the sum is exact, and all responding clients have equal weight. Settings with which the sum could wrap
    around raise an error. There is no differential privacy: the mean itself may reveal information about a client.

    Raises:
        SettingError: A setting is out of range, or sums could wrap around.
        MissingExtra: The cryptography for ``protocol=full`` is not installed.

    Reference: Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning*, CCS 2017.
    """
    masking = Masking(
        clip_norm=clip_norm,
        bits=bits,
        threshold=threshold,
        cohort=cohort,
        modulus_bits=modulus_bits,
        protocol=protocol,
    )
    return Mechanism(validate=partial(_refuse, "secagg"), protect=partial(_protect_with_masks, masking), kind="secagg")


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
    """Return distributed differential privacy: secure aggregation, in which the noise of the clients adds up.

    Each client clips its update to ``clip_norm`` and rounds it at random, with a bound on the norm. It then adds
    integer noise with standard deviation ``noise_multiplier * bound / sqrt(threshold)``. A sum that may be opened has
    clients of at least ``threshold`` parties, so it has enough noise.

    Args:
        clip_norm: L2 bound on an update, > 0; see `secagg`.
        noise_multiplier: standard deviation of the noise of ``threshold`` clients divided by the bound, > 0;
            None for the smallest value that satisfies ``epsilon`` for the planned rounds.
        epsilon: budget; the run stops before a client exceeds this. None for no limit.
        delta: in (0, 1), below 1 over the number of clients.
        noise: distribution of the noise, ``skellam`` or ``discrete_gaussian``.
        bits: bits of one parameter, in [2, 48]; see `secagg`. Rounding is random and unbiased. 14 bits are enough for
            models of up to five million parameters; each additional bit allows four times as many. The noise is coarser
            than the rounding.
        threshold: smallest number of parties in a sum; see `secagg`.
        cohort: largest number of clients per round; see `secagg`. It is also the divisor of the sum, for any number of
            responses.
        modulus_bits: bits of the transmitted integers; see `secagg`.
        flatten: factor >= 1 by which rotated parameters are smaller than ``clip_norm``; 1 for no rotation. A random
            rotation keeps each parameter below ``clip_norm / flatten``, except with probability 1e-9; larger values are
            clipped. The same bits then give a scale that is finer by this factor.
        protocol: ``sum`` or ``full``; see `secagg`.

    *Guarantees*: any sum that can be opened is differentially private against all who see it, including the server. The
    adjacency is one client's update replaced by zero. A party that colludes with the server knows its noise. With c
    such parties, the remaining noise multiplier is ``noise_multiplier * sqrt((threshold - c) / threshold)``. On real
    nodes noise comes from the operating system's entropy. Renyi divergences give the cost, at whole orders
    for ``skellam`` and at all orders for ``discrete_gaussian``. There is no amplification, because the server knows the
    cohort. Each client pays for its own rounds; the ledger reports the largest cost.

    Raises:
        SettingError: A setting is out of range. `Mechanism.protect` also raises it if sums could wrap around, or if a
            client's noise is below one integer or too large to sample.
        MissingExtra: The cryptography for random numbers is not installed.

    References: Kairouz, Liu, Steinke, *The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation*, ICML 2021, arXiv:2102.06387; Agarwal, Kairouz, Liu, *The Skellam Mechanism for Differentially Private
    Federated Learning*, NeurIPS 2021, arXiv:2110.04995.
    """
    budget = NoiseCalibration(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    require(noise in NOISES, "noise", noise, f"one of {', '.join(NOISES)}", "noise=skellam")
    masking = Masking(
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
        validate=partial(_refuse, "distributed"),
        protect=partial(_protect_with_noise, masking, budget),
        kind="distributed",
    )


def _refuse(kind: str, strategy: Strategy, local: LocalSettings) -> None:
    refuse_example_dp(local, kind)
    refuse_unequal_weights(strategy, kind)
    refuse_extra_uploads(strategy, kind)


def _protect_with_masks(
    masking: Masking, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    masking = replace(masking, num_parties=population.num_parties)
    size = masking.cohort_size(strategy, population.num_clients)
    threshold = masking.threshold_of(size)
    guarantee = PrivacyGuarantee(
        kind="secagg",
        adjacency=f"only sums of at least {threshold} parties can be opened",
        charge=lambda ledger, release: ledger,
        epsilon_of=lambda ledger: None,
        **_shared_parts(masking, size),
    )
    protected = masking.protect(strategy, num_clients=population.num_clients)
    return replace_parts(protected, privacy_guarantee=guarantee), local


def _protect_with_noise(
    masking: Masking, budget: NoiseCalibration, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    masking = replace(masking, num_parties=population.num_parties)
    size = masking.cohort_size(strategy, population.num_clients)

    def event_of(noise: float) -> RenyiEvent:
        """Return upper bounds on the divergences: the divergences of the equivalent Gaussian noise.

        The theorem about Skellam noise covers whole orders only. The theorem about discrete Gaussian noise is a bound
        on the concentrated divergence, which covers all orders.
        """
        orders = WHOLE_ORDERS if masking.noise == "skellam" else FRACTIONAL_ORDERS
        z = replace(masking, noise_multiplier=noise).smallest_noisy_sum(size).equivalent_noise_multiplier
        return RenyiEvent(orders, tuple(order / (2 * z**2) for order in orders))

    def planned(noise: float) -> Sequence[EventHistory]:
        return [event_history({event_of(noise): population.rounds})]

    noise = budget.resolve_noise_multiplier(planned)
    masking, event = replace(masking, noise_multiplier=noise), event_of(noise)

    def charge(ledger: Ledger, release: Release) -> Ledger:
        return ledger.charge_clients(dict.fromkeys((*release.clients, *release.dropouts), (event, 1)))

    guarantee = PrivacyGuarantee(
        kind="distributed",
        adjacency="one client's update replaced by zero",
        charge=charge,
        epsilon_of=lambda ledger: max_epsilon_bounds(ledger.histories, delta=budget.delta),
        max_epsilon=budget.epsilon,
        holds_against_server=True,
        delta=budget.delta,
        noise_multiplier=noise,
        warnings=tuple(delta_warnings(budget.delta, population.num_clients)),
        **_shared_parts(masking, size),
    )
    protected = masking.protect(strategy, num_clients=population.num_clients)
    return replace_parts(protected, privacy_guarantee=guarantee), local


def _shared_parts(masking: Masking, size: int) -> dict[str, Any]:
    revealed = "the sums themselves" if masking.noise is None else "the ids of the participating clients"
    return {
        "unit": "client",
        "clip_norm": masking.clip_norm,
        "threshold": masking.threshold_of(size),
        "encoding_digest": masking.encoding_digest(size),
        "not_covered": (EVALUATION_NOT_COVERED, FAILURES_NOT_COVERED, revealed),
    }
