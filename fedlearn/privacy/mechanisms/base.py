"""From a privacy setting to a protected strategy, in two steps: what can be refused without data, and the rest.

Refusals say which setting to change. What a mechanism needs to know of the population (its size gives the sampling
rate, and with it the noise that a budget takes) is only known once data are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from fedlearn.algorithm.strategy import CompositionError, Strategy, extra_names
from fedlearn.core.privacy_ledger import EventHistory
from fedlearn.core.records import ClientId, LocalSettings
from fedlearn.errors import is_number, require
from fedlearn.privacy.accounting import calibrate_noise_multiplier, require_delta, require_epsilon

EVALUATION_NOT_COVERED = "the evaluation of the model on clients' held-out examples"
FAILURES_NOT_COVERED = "who failed and why, how many took part, and how long it took"


@dataclass(frozen=True, kw_only=True)
class Population:
    """Describe the population, as far as a mechanism needs it.

    Args:
        clients: that a cohort is drawn from.
        rounds: planned.
        num_examples_of: how many training examples a client has; None if nobody knows.
    """

    clients: Sequence[ClientId]
    rounds: int
    num_examples_of: Callable[[ClientId], int] | None = None

    @property
    def num_clients(self) -> int:
        """How many there are."""
        return len(self.clients)


class Mechanism(NamedTuple):
    """Describe a privacy mechanism before it is applied to a strategy.

    Attributes:
        validate: ``(strategy, local) -> None``; raises where the promise could not hold, before any data are loaded.
        protect: ``(strategy, local, population) -> (strategy, local)`` with protection in place.
        kind: its name.
    """

    validate: Callable[[Strategy, LocalSettings], None]
    protect: Callable[[Strategy, LocalSettings, Population], tuple[Strategy, LocalSettings]]
    kind: str


def none() -> Mechanism:
    """No protection."""
    return Mechanism(
        validate=lambda strategy, local: None,
        protect=lambda strategy, local, population: (strategy, local),
        kind="none",
    )


@dataclass(frozen=True, kw_only=True)
class NoiseCalibration:
    """How much noise, by multiplier or by the epsilon it must keep.

    Args:
        noise_multiplier: standard deviation of the noise over the clip norm; None: what ``epsilon`` takes for the
            planned rounds.
        epsilon: the run stops before it passes this; None: no limit, the noise is given.
        delta: in (0, 1).
    """

    noise_multiplier: float | None
    epsilon: float | None
    delta: float

    def __post_init__(self) -> None:
        require_delta(self.delta)
        if self.epsilon is not None:
            require_epsilon(self.epsilon)
        noise = self.noise_multiplier
        some = noise is not None or self.epsilon is not None
        positive = noise is None or (is_number(noise, at_least=0) and 0 < noise < inf)
        fix = "noise_multiplier=1.0, or epsilon=2.0, which finds the noise for the planned rounds"
        require(some and positive, "noise_multiplier", noise, "a finite number > 0 (or give epsilon)", fix)

    def resolve_noise_multiplier(self, histories_of: Callable[[float], Sequence[EventHistory]]) -> float:
        """The noise multiplier, given or found."""
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
        raise CompositionError(f"{reason}\n  try       {fix}")


def refuse_example_dp(local: LocalSettings, kind: str) -> None:
    """Two mechanisms at once would need one claim for both, which no ledger here makes."""
    refuse_if(local.example_dp is not None, f"privacy={kind} does not account for local.example_dp", "privacy=example")


def refuse_extra_uploads(strategy: Strategy, kind: str) -> None:
    """What a local rule sends besides its update (SCAFFOLD's control variate) gets no noise."""
    names = ", ".join(extra_names(strategy.local))
    reason = (
        f"privacy={kind} clips and noises the update, but the local rule also sends {names}, which would leave bare"
    )
    refuse_if(bool(names), reason, "strategy=fedavg or strategy=fedprox, or privacy=example")


def refuse_unequal_weights(strategy: Strategy, kind: str) -> None:
    """Sensitivity is known for an equally weighted mean only."""
    aggregate = strategy.aggregate
    reason = f"privacy={kind} needs an equally weighted mean, but a client with many examples would move this one more"
    refuse_if(aggregate.is_sum and aggregate.sensitivity is None, reason, "strategy.weighting=equal")
    reason = (
        f"privacy={kind} needs a mean: how far one client moves this aggregate is unknown (a median, a robust rule)"
    )
    refuse_if(not aggregate.is_sum, reason, "strategy=fedavg strategy.weighting=equal, or privacy=local")


def replace_parts(strategy: Strategy, **parts: object) -> Strategy:
    """The strategy with parts replaced; its own checks run again."""
    return replace(strategy, **parts)  # type: ignore[arg-type]


def delta_warnings(delta: float, num_records: float) -> list[str]:
    """What a reader must be told of a delta that allows one record to be published whole."""
    if delta < 1 / num_records:
        return []
    return [f"delta {delta:g} is not below 1/{num_records:g}: a mechanism that publishes one record would pass"]
