"""Results of the audited rounds, and their comparison with the claim of the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from fedlearn.core.privacy_ledger import Event, Ledger
from fedlearn.privacy.audit import SIGNIFICANCE, AuditResult, Scores
from fedlearn.privacy.example_sensitivity import Sensitivity

NUM_DEVIATIONS = 4  # standard deviations by which a measured noise multiplier may be below the accounted one
MIN_SLACK = 0.02  # smallest accepted relative difference of noise multipliers; rounding is far below


@dataclass(frozen=True, kw_only=True)
class MeasuredNoise:
    """Noise of the releases, as a multiple of the sensitivity.

    Attributes:
        multiplier: measured standard deviation of the noise divided by the measured or promised sensitivity.
        accounted: noise multiplier in the ledger.
        num_values: number of values behind the standard deviation.
    """

    multiplier: float
    accounted: float
    num_values: int

    @property
    def is_sufficient(self) -> bool:
        """True unless the noise is clearly smaller than the ledger assumes."""
        slack = max(MIN_SLACK, NUM_DEVIATIONS / sqrt(2 * max(1, self.num_values)))
        return self.multiplier >= self.accounted * (1 - slack)


@dataclass(frozen=True, kw_only=True)
class AuditedRun:
    """An audited run and its claim.

    Attributes:
        scores: scores of the canaries, from the released parameters.
        privacy_unit: ``client`` or ``example``.
        num_rounds: number of audited rounds.
        delta: delta of the claim.
        claimed_epsilon: epsilon of the ledger for the audited releases; None without a privacy guarantee.
        is_gaussian: True if all releases together are one release with Gaussian noise.
        sensitivity: largest movement of the clipped sum by one example; None if it was not measured.
        noise: measured noise; None if it was not measured.
        signal: median contribution of a canary, in clip norms; None if it is fixed.
        exercised: parts of the run that the audit executes.
        not_exercised: parts of the run that the audit replaces or skips.
    """

    scores: Scores
    privacy_unit: str
    num_rounds: int
    delta: float
    claimed_epsilon: float | None
    is_gaussian: bool = True
    sensitivity: Sensitivity | None = None
    noise: MeasuredNoise | None = None
    signal: float | None = None
    exercised: tuple[str, ...] = ()
    not_exercised: tuple[str, ...] = ()

    def faults(self, result: AuditResult) -> list[str]:
        """Return a sentence for each contradiction of the claim; an empty list without one."""
        faults = []
        if self.claimed_epsilon is not None and result.epsilon_lower_bound > self.claimed_epsilon:
            bound = f"epsilon is at least {result.epsilon_lower_bound:.3g} with {1 - SIGNIFICANCE:.0%} confidence"
            faults.append(f"{bound}, but the claimed epsilon is {self.claimed_epsilon:.4g}")
        if self.sensitivity is not None and not self.sensitivity.is_bounded:
            moved = f"one example moves the clipped sum by {self.sensitivity.movement:.3g} clip norms instead of 1"
            faults.append(f"{moved} ({self.sensitivity.case})")
        if self.noise is not None and not self.noise.is_sufficient:
            measured, accounted = f"{self.noise.multiplier:.3g}", f"{self.noise.accounted:.3g}"
            faults.append(f"the measured noise multiplier is {measured}, but the ledger accounts for {accounted}")
        return faults


def accounted_multiplier(ledger: Ledger, noise_multiplier: float | None) -> float | None:
    """Return the smallest noise multiplier in a ledger; ``noise_multiplier`` if the ledger has other events."""
    events = [event for history in (ledger.federation, *ledger.histories) for event, _ in history]
    multipliers = [event.noise_multiplier for event in events if isinstance(event, Event)]
    return min(multipliers) if multipliers and len(multipliers) == len(events) else noise_multiplier


def measure_noise(values: np.ndarray, sensitivity: float, accounted: float | None) -> MeasuredNoise | None:
    """Return the noise of released values that contain noise only.

    Args:
        values: noise of the release.
        sensitivity: contribution of one privacy unit, in the same scale.
        accounted: noise multiplier of the ledger; None if there is none.
    """
    if accounted is None or not len(values) or not sensitivity > 0:
        return None
    multiplier = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) / sensitivity
    return MeasuredNoise(multiplier=multiplier, accounted=accounted, num_values=len(values))


def join(parts: Sequence[str]) -> str:
    """Return the parts as one line of a report."""
    return "; ".join(parts)
