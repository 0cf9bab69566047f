"""Client-level central differential privacy: a mean of clipped updates with noise.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, inf

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.aggregation import expected_mean
from fedlearn.algorithm.client_selection import SamplingLaw, Selector, poisson
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context, Stage, Transform
from fedlearn.algorithm.transforms import clip_norm as clipped
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_guarantee import Neighbors, PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Event, EventHistory, Ledger, event_history
from fedlearn.core.records import Array, ClientId, LocalSettings, State
from fedlearn.errors import SettingError, is_number, require
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.privacy.gaussian_noise import add_gaussian_noise, standard_normals
from fedlearn.privacy.mechanisms.base import (
    EVALUATION_NOT_COVERED,
    FAILURES_NOT_COVERED,
    Mechanism,
    NoiseCalibration,
    Population,
    delta_warnings,
    refuse_example_dp,
    refuse_extra_uploads,
    refuse_if,
    refuse_unequal_weights,
    replace_parts,
    require_clip_norm,
)

CLIP_MODES = ("fixed", "adaptive")
SAMPLINGS = ("poisson", "fixed_size")


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Settings of a clip norm that tracks a quantile of the update norms.

    Args:
        quantile: target share of unclipped updates, in (0, 1).
        learning_rate: step size on the logarithm of the clip norm, > 0.

    Reference: Andrew, Thakkar, McMahan, Ramaswamy, *Differentially Private Learning with Adaptive Clipping*, NeurIPS
    2021, arXiv:1905.03871.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2


def central(
    *,
    clip_norm: float = 1.0,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float = 1e-5,
    sampling: str = "poisson",
    clip: str = "fixed",
    target_quantile: float = 0.5,
    clip_learning_rate: float = 0.2,
) -> Mechanism:
    """Return central privacy: the server adds noise to the mean. Later steps, such as its optimizer, cost nothing more.

    ``delta = (sum_k clip(delta_k, C) + N(0, (z C)^2 I)) / E[cohort]``

    Args:
        clip_norm: C, the L2 bound on an update, > 0; the initial value if ``clip`` is ``adaptive``.
        noise_multiplier: z, the standard deviation of the noise on the sum divided by C, > 0; None for the smallest
            value that satisfies ``epsilon``.
        epsilon: budget; the run stops before it exceeds this. None for no limit.
        delta: in (0, 1), below 1 over the number of clients.
        sampling: ``poisson`` draws each client independently (adjacency: one client added or removed). ``fixed_size``
            draws cohorts of one size without replacement (adjacency: one client's data replaced, which doubles the
            sensitivity). If a strategy selects all clients, the ledger books no sampling.
        clip: ``fixed``, or ``adaptive``: C tracks a quantile of the norms.
        target_quantile: target share of unclipped updates for ``clip="adaptive"``, in (0, 1).
        clip_learning_rate: step size on the logarithm of C for ``clip="adaptive"``, > 0.

    *Guarantees*: the models are (epsilon, delta)-private, with the values of the ledger. The server sees each single
    update; use `distributed` to hide them. Missing clients count as zero and never reduce the denominator. An empty
    cohort releases noise.

    References: McMahan, Ramage, Talwar, Zhang, *Learning Differentially Private Recurrent Language Models*, ICLR 2018,
    arXiv:1710.06963; Andrew, Thakkar, McMahan, Ramaswamy, *Differentially Private Learning with Adaptive Clipping*,
    NeurIPS 2021, arXiv:1905.03871.

    Raises:
        SettingError: A number is out of range, or is NaN.
    """
    require_clip_norm(clip_norm)
    budget = NoiseCalibration(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    require(clip in CLIP_MODES, "clip", clip, f"one of {', '.join(CLIP_MODES)}", "clip=fixed")
    require(sampling in SAMPLINGS, "sampling", sampling, f"one of {', '.join(SAMPLINGS)}", "sampling=poisson")
    share, rate = target_quantile, clip_learning_rate
    inside = is_number(share, at_least=0, below=1) and share > 0
    require(inside, "target_quantile", share, "a share in (0, 1)", "target_quantile=0.5")
    positive = is_number(rate, at_least=0) and 0 < rate < inf
    require(positive, "clip_learning_rate", rate, "a finite number > 0", "clip_learning_rate=0.2")
    adaptive = AdaptiveClip(quantile=share, learning_rate=rate) if clip == "adaptive" else None
    settings = CentralSettings(clip_norm=clip_norm, calibration=budget, sampling=sampling, adaptive=adaptive)
    return Mechanism(validate=_refuse, protect=partial(_protect, settings), kind="central")


@dataclass(frozen=True, kw_only=True)
class CentralSettings:
    """The checked arguments of `central`."""

    clip_norm: float
    calibration: NoiseCalibration
    sampling: str
    adaptive: AdaptiveClip | None


def _refuse(strategy: Strategy, local: LocalSettings) -> None:
    refuse_example_dp(local, "central")
    refuse_unequal_weights(strategy, "central")
    refuse_extra_uploads(strategy, "central")
    law = strategy.select.law
    unknown = law is None or law.kind == "min_separation"
    reason = "privacy=central needs a sampling law that the ledger can account for, but this selector has none"
    refuse_if(unknown, reason, "a strategy with clients_per_round, or privacy=ftrl, which assumes no sampling")


def _protect(
    settings: CentralSettings, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    law, num_clients = strategy.select.law, population.num_clients
    assert law is not None
    size = law.size if law.rate is None else law.rate * num_clients
    cohort = float(num_clients if law.kind == "all" else size or 0)
    if cohort > num_clients:
        name = "strategy.clients_per_round"
        raise SettingError(name, f"{cohort:g}", f"at most {num_clients}", f"{name}={num_clients}")
    select = _accounted_selector(settings, strategy.select, cohort, num_clients)
    assert select.law is not None
    law, event_of = select.law, partial(_event, select.law, cohort / num_clients)

    def planned(noise: float) -> list[EventHistory]:
        return [event_history({event_of(noise): population.rounds})]

    noise = settings.calibration.resolve_noise_multiplier(planned)
    stage = _fixed_stage(settings.clip_norm, noise, cohort, event_of(noise))
    if settings.adaptive is not None:
        stage = _adaptive_stage(settings.adaptive, settings.clip_norm, noise, cohort, event_of(noise))
    return replace_parts(
        strategy,
        select=select,
        stages=(*strategy.stages, stage),
        aggregate=expected_mean(cohort, num_extra=settings.adaptive is not None),
        privacy_guarantee=_guarantee(settings, noise, event_of(noise), law, cohort, population),
    ), local


def _accounted_selector(settings: CentralSettings, select: Selector, cohort: float, num_clients: int) -> Selector:
    """Return the selector with the sampling law of the ledger, also if clients join or leave.

    Poisson sampling keeps its rate. A cohort of fixed size is a larger share of fewer clients; it raises an error.
    """
    assert select.law is not None
    if select.law.kind == "all":
        return select
    if select.law.kind == "poisson" or settings.sampling == "poisson":
        return poisson(rate=cohort / num_clients)

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        fix = "privacy.sampling=poisson"
        reason = f"{len(clients)} clients are available, fewer than the {num_clients} that the sampling rate assumes"
        refuse_if(len(clients) < num_clients, reason, fix)
        return select.choose(round, clients, rng)

    return Selector(choose=choose, law=select.law)


def _event(law: SamplingLaw, rate: float, noise: float) -> Event:
    """Return the event of one round. A replaced client moves the sum by 2 C, so the multiplier of z C is z / 2."""
    if law.kind == "fixed_size" and rate < 1:
        return Event(noise / 2, "fixed_size", rate)
    return Event(noise, "poisson", rate) if law.kind == "poisson" and rate < 1 else Event(noise)


def _fixed_stage(bound: float, noise: float, cohort: float, event: Event) -> Stage:
    std = noise * bound / cohort

    def clip(update: Array, state: State, context: Context) -> tuple[Array, State]:
        return clip_finite(update, bound), state

    def add_noise(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        return add_gaussian_noise(update_D, standard_normals(update_D.shape, context), std), state

    return Stage(
        client=Transform(update=clip),
        server=Transform(update=add_noise),
        event=event,
        is_nonexpansive=True,
        has_norm_bound=True,
    )


def clip_finite(update: Array, clip_norm: float) -> Array:
    """Clip an update to an L2 norm. Values that are not finite count as zero, because a NaN would disable clipping."""
    xp = array_namespace(update)
    return clipped(xp.where(xp.isfinite(update), update, xp.zeros_like(update)), clip_norm)


def _adaptive_stage(adaptive: AdaptiveClip, start: float, noise: float, cohort: float, event: Event) -> Stage:
    """Return the stage of the adaptive clip norm.

    A round uses one clip norm for its updates and its noise; the clip norm changes after the round. Clients send one
    more number, ``b_k - 1/2``. ``b_k`` is 1 for an unclipped update, else 0. Both sums together cost as much as a fixed
    clip with multiplier z, because ``z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)``.
    """
    std_bits = cohort / 20
    limit = f"below {2 * std_bits:g}, a tenth of the expected cohort, because the count also needs noise"
    require(noise < 2 * std_bits, "privacy.noise_multiplier", noise, limit, "privacy.clip=fixed")
    noise_delta = (noise**-2 - (2 * std_bits) ** -2) ** -0.5

    def clip(update: Array, state: State, context: Context) -> tuple[Array, State]:
        bound = float(np.asarray(context.broadcast["clip_norm"])[0])
        xp = array_namespace(update)
        unclipped = xp.linalg.vector_norm(update, axis=-1, keepdims=True) <= bound  # False for NaN
        bit = xp.astype(unclipped, update.dtype) - 0.5
        return xp.concat([clip_finite(update, bound), bit], axis=-1), state

    def add_noise(update: Array, state: State, context: Context) -> tuple[Array, State]:
        bound, draws = float(state["clip_norm"][0]), standard_normals(update.shape, context)
        delta_D = add_gaussian_noise(update[:-1], draws[:-1], noise_delta * bound / cohort)
        share = float(update[-1]) + std_bits / cohort * draws[-1] + 0.5
        moved = bound * exp(-adaptive.learning_rate * (share - adaptive.quantile))
        return delta_D, {"clip_norm": np.array([moved])}

    def init(layout: Layout) -> State:
        return {"clip_norm": np.array([start])}

    server = Transform(update=add_noise, init=init, broadcast=lambda state: {"clip_norm": state["clip_norm"]})
    return Stage(client=Transform(update=clip), server=server, event=event, is_nonexpansive=True, has_norm_bound=True)


def _guarantee(
    settings: CentralSettings, noise: float, event: Event, law: SamplingLaw, cohort: float, population: Population
) -> PrivacyGuarantee:
    delta, replaced = settings.calibration.delta, event.sampling == "fixed_size"
    descriptions = {
        "poisson": f"Poisson, each client with probability {event.rate:g}",
        "fixed_size": f"without replacement, {cohort:g} of {population.num_clients}",
        "none": "none: all clients take part",
    }

    def charge(ledger: Ledger, release: Release) -> Ledger:
        return ledger.charge_federation(event)

    return PrivacyGuarantee(
        charge=charge,
        epsilon_of=lambda ledger: max_epsilon_bounds([ledger.federation], delta=delta),
        max_epsilon=settings.calibration.epsilon,
        supports_empty_rounds=law.kind == "poisson",
        kind="central",
        unit="client",
        neighbors=Neighbors.REPLACE if replaced else Neighbors.ADD_OR_REMOVE,
        adjacency="one client's data replaced" if replaced else "one client added or removed",
        sampling=descriptions[event.sampling],
        delta=delta,
        noise_multiplier=noise,
        clip_norm=settings.clip_norm,
        clip="adaptive" if settings.adaptive else "fixed",
        not_covered=(
            EVALUATION_NOT_COVERED,
            FAILURES_NOT_COVERED,
            "a server that reads single updates before it adds them",
        ),
        warnings=tuple(delta_warnings(delta, population.num_clients)),
    )
