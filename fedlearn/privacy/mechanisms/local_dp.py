"""Local differential privacy: each client adds noise to its own update, so no trust in the server is needed.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context, Stage, Transform
from fedlearn.core.privacy_guarantee import Neighbors, PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Event, EventHistory, Ledger, event_history
from fedlearn.core.records import Array, LocalSettings, State
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
    replace_parts,
    require_clip_norm,
)
from fedlearn.privacy.mechanisms.central_dp import clip_finite


def local(
    *,
    clip_norm: float = 1.0,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float = 1e-5,
) -> Mechanism:
    """Return local privacy: each upload is ``clip(delta_k, C) + N(0, (z C)^2 I)``. Later steps cost nothing more.

    Replacing the data of a client moves its clipped update by up to ``2 C``. So an upload costs as much as a Gaussian
    mechanism with multiplier ``z / 2``. This cost is exact; the classical formula holds only below epsilon 1. The costs
    compose over the rounds in which the client takes part.

    Args:
        clip_norm: C, the L2 bound on an update, > 0.
        noise_multiplier: z, the standard deviation of the noise divided by C, > 0; None for the smallest value that
            satisfies ``epsilon`` for a client that takes part in every planned round.
        epsilon: budget of each client for the whole run; the run stops before a client exceeds it. None for no limit.
        delta: in (0, 1).

    *Guarantees*: the uploads of each client are (epsilon, delta)-private against all others, including the server. The
    ledger reports the largest epsilon of a client.

    References: Balle, Wang, *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018, arXiv:1805.06530.

    Raises:
        SettingError: A number is out of range, or is NaN.
    """
    require_clip_norm(clip_norm)
    budget = NoiseCalibration(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    return Mechanism(validate=_refuse, protect=partial(_protect, clip_norm, budget), kind="local")


def _refuse(strategy: Strategy, local: LocalSettings) -> None:
    refuse_example_dp(local, "local")
    refuse_extra_uploads(strategy, "local")
    weighted = strategy.aggregate.is_sum and strategy.aggregate.sensitivity is None
    reason = "privacy=local keeps example counts at the clients, so the server cannot weight updates by them"
    refuse_if(weighted, reason, "strategy.weighting=equal")


def _protect(
    clip_norm: float, budget: NoiseCalibration, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    def planned(noise: float) -> list[EventHistory]:
        return [event_history({Event(noise / 2): population.rounds})]

    noise = budget.resolve_noise_multiplier(planned)
    stage = _client_noise_stage(clip_norm, noise * clip_norm)
    guarantee = _guarantee(clip_norm, noise, budget, population)
    return replace_parts(strategy, stages=(*strategy.stages, stage), privacy_guarantee=guarantee), local


def _client_noise_stage(bound: float, std: float) -> Stage:
    def clip_and_noise(update_KD: Array, state: State, context: Context) -> tuple[Array, State]:
        clients, num_parameters = context.clients_K.tolist(), update_KD.shape[-1]
        draws_KD = np.stack([standard_normals((num_parameters,), context, client=client) for client in clients])
        return add_gaussian_noise(clip_finite(update_KD, bound), draws_KD, std), state

    return Stage(client=Transform(update=clip_and_noise))


def _guarantee(clip_norm: float, noise: float, budget: NoiseCalibration, population: Population) -> PrivacyGuarantee:
    event, delta = Event(noise / 2), budget.delta

    def charge(ledger: Ledger, release: Release) -> Ledger:
        return ledger.charge_clients(dict.fromkeys((*release.clients, *release.dropouts), (event, 1)))

    return PrivacyGuarantee(
        charge=charge,
        epsilon_of=lambda ledger: max_epsilon_bounds(ledger.histories, delta=delta),
        max_epsilon=budget.epsilon,
        holds_against_server=True,
        kind="local",
        unit="client",
        neighbors=Neighbors.REPLACE,
        adjacency="one client's data replaced",
        sampling="none assumed; each client pays for its rounds, and the largest epsilon is reported",
        delta=delta,
        noise_multiplier=noise,
        clip_norm=clip_norm,
        clip="fixed",
        not_covered=(EVALUATION_NOT_COVERED, FAILURES_NOT_COVERED),
        warnings=tuple(delta_warnings(delta, population.num_clients)),
    )
