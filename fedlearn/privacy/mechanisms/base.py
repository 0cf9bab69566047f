"""Shared parts of the privacy mechanisms: their protocol, noise calibration and refusals.

A mechanism is applied to a strategy in two steps. `Mechanism.validate` needs no data and refuses unsound combinations;
each refusal names the setting to change. `Mechanism.protect` validates again, and needs the population: its size
determines the sampling rate, and the sampling rate determines the noise for a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from fedlearn.advice import label
from fedlearn.algorithm.strategy import CompositionError, Strategy, extra_names
from fedlearn.core.privacy_ledger import EventHistory
from fedlearn.core.records import ClientId, LocalSettings
from fedlearn.errors import is_number, require
from fedlearn.privacy.accounting import calibrate_noise_multiplier, require_delta, require_epsilon

EVALUATION_NOT_COVERED = "the evaluation of the model on clients' held-out examples"
FAILURES_NOT_COVERED = "failures with their reasons, the number of participating clients, and durations"


@dataclass(frozen=True, kw_only=True)
class Population:
    """Describe the population to a mechanism.

    Args:
        clients: ids of all clients from which cohorts are drawn.
        rounds: number of planned rounds, >= 1.
        num_examples_of: function that returns the number of training examples of a client; None if it is unknown.
        num_parties: number of nodes with these clients, >= 1; None: each client is a party of its own.
    """

    clients: Sequence[ClientId]
    rounds: int
    num_examples_of: Callable[[ClientId], int] | None = None
    num_parties: int | None = None

    @property
    def num_clients(self) -> int:
        """Number of clients in the population."""
        return len(self.clients)


Protect = Callable[[Strategy, LocalSettings, Population], tuple[Strategy, LocalSettings]]


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Describe a privacy mechanism before it is applied to a strategy.

    Args:
        validate: ``(strategy, local) -> None``; raises an error if the guarantee could not hold. It needs no data.
        protect: ``(strategy, local, population) -> (strategy, local)``; adds the mechanism.
        kind: name of the mechanism.

    *Guarantees*: the attribute ``protect`` calls ``validate`` first. So a simulation, a coordinator and a node refuse
    the same combinations, and no caller can forget the check.
    """

    validate: Callable[[Strategy, LocalSettings], None]
    protect: Protect
    kind: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "protect", partial(_validate_and_protect, self.validate, self.protect))


def _validate_and_protect(
    validate: Callable[[Strategy, LocalSettings], None],
    protect: Protect,
    strategy: Strategy,
    local: LocalSettings,
    population: Population,
) -> tuple[Strategy, LocalSettings]:
    validate(strategy, local)
    return protect(strategy, local, population)


def none() -> Mechanism:
    """Return the mechanism that changes nothing and guarantees nothing."""
    return Mechanism(
        validate=lambda strategy, local: None,
        protect=lambda strategy, local, population: (strategy, local),
        kind="none",
    )


@dataclass(frozen=True, kw_only=True)
class NoiseCalibration:
    """Specify the noise by its multiplier, or by the epsilon that it must satisfy.

    Args:
        noise_multiplier: standard deviation of the noise divided by the clip norm, > 0; None for the smallest value
            that satisfies ``epsilon`` for the planned rounds.
        epsilon: budget; the run stops before it exceeds this. None for no limit; then ``noise_multiplier`` is required.
        delta: in (0, 1).

    Raises:
        SettingError: A number is out of range, or both the noise multiplier and epsilon are None.
    """

    noise_multiplier: float | None
    epsilon: float | None
    delta: float

    def __post_init__(self) -> None:
        require_delta(self.delta)
        if self.epsilon is not None:
            require_epsilon(self.epsilon)
        noise = self.noise_multiplier
        is_set = noise is not None or self.epsilon is not None
        positive = noise is None or (is_number(noise, at_least=0) and 0 < noise < inf)
        expected = "a finite number > 0, or null and a value of epsilon"
        require(is_set and positive, "noise_multiplier", noise, expected, "noise_multiplier=1.0")

    def resolve_noise_multiplier(self, histories_of: Callable[[float], Sequence[EventHistory]]) -> float:
        """Return the noise multiplier: the setting, or the calibrated value.

        Args:
            histories_of: function from a noise multiplier to the planned releases.
        """
        if self.noise_multiplier is not None:
            return float(self.noise_multiplier)
        assert self.epsilon is not None
        return calibrate_noise_multiplier(histories_of, epsilon=self.epsilon, delta=self.delta)


def require_clip_norm(clip_norm: float) -> None:
    """Raise a `SettingError` unless the clip norm is a finite number > 0; NaN is not."""
    positive = is_number(clip_norm, at_least=0) and 0 < clip_norm < inf
    require(positive, "clip_norm", clip_norm, "a finite number > 0", "clip_norm=1.0")


def refuse_if(condition: bool, reason: str, fix: str) -> None:
    """Raise a `CompositionError` with the reason and the setting to change."""
    if condition:
        raise CompositionError(f"{reason}\n{label(fix)}")


def refuse_example_dp(local: LocalSettings, kind: str) -> None:
    """Raise a `CompositionError` if clients train with DP-SGD, because no ledger accounts for two mechanisms."""
    refuse_if(local.example_dp is not None, f"privacy={kind} does not account for local.example_dp", "privacy=example")


def refuse_extra_uploads(strategy: Strategy, kind: str) -> None:
    """Raise a `CompositionError` if the local rule sends further vectors (SCAFFOLD), because they get no noise."""
    names = ", ".join(extra_names(strategy.local))
    reason = (
        f"privacy={kind} clips the update and adds noise to it, but the local rule also sends {names} without noise"
    )
    refuse_if(bool(names), reason, "strategy=fedavg or strategy=fedprox, or privacy=example")


def refuse_unequal_weights(strategy: Strategy, kind: str) -> None:
    """Raise a `CompositionError` unless the aggregate is an equally weighted mean, whose sensitivity is known."""
    aggregate = strategy.aggregate
    reason = f"privacy={kind} needs an equally weighted mean, but here clients with many examples have more weight"
    refuse_if(aggregate.is_sum and aggregate.sensitivity is None, reason, "strategy.weighting=equal")
    reason = f"privacy={kind} needs a mean of updates, but the server multiplies the factors of each client"
    refuse_if(strategy.merges_adapters, reason, "strategy=ffa_lora strategy.weighting=equal, or privacy=local")
    reason = f"privacy={kind} needs a mean, but the sensitivity of this aggregate (a median, a robust rule) is unknown"
    refuse_if(not aggregate.is_sum, reason, "strategy=fedavg strategy.weighting=equal, or privacy=local")


def replace_parts(strategy: Strategy, **parts: object) -> Strategy:
    """Return the strategy with these parts replaced. The checks of the strategy run again."""
    return replace(strategy, **parts)  # type: ignore[arg-type]


def delta_warnings(delta: float, num_records: float) -> list[str]:
    """Return a warning if ``delta`` is at least 1 / ``num_records``: it permits the publication of one record.

    Args:
        delta: in (0, 1).
        num_records: number of clients or examples, >= 1.
    """
    if delta < 1 / num_records:
        return []
    return [f"delta {delta:g} is not below 1/{num_records:g}: it permits a mechanism that publishes one record"]
