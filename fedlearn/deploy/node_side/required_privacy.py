"""Check the privacy mechanism of a request against the privacy that a node requires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlearn.core.records import LocalSettings
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.errors import is_count, is_number, require

PRIVACY_LEVELS = ("none", "example", "local", "secagg")
REQUIRED_MECHANISMS = {
    "local": (("local",), "without noise"),
    "secagg": (("secagg", "distributed"), "without a mask"),
}


@dataclass(frozen=True, kw_only=True)
class RequiredPrivacy:
    """The privacy that a node requires of each request.

    Args:
        minimum: required mechanism, default ``none``. ``example``: DP-SGD in the trainer. ``local``: clipping and noise
            at the node. ``secagg``: updates leave with a mask (privacy=secagg or distributed). These mechanisms protect
            from the coordinator too, so the node does not have to trust it.
        max_clip: largest clip norm of the required mechanism, >= 0; None: no limit.
        min_noise_multiplier: smallest noise multiplier of the required mechanism, >= 0; None: no limit.
        min_nodes_in_sum: smallest number of nodes in a masked sum, >= 2, default 2. Clients of one node count once.
        max_colluding_nodes: number of other nodes in a sum that may help a coordinator that deviates from the protocol,
            >= 0, default 1. The node accepts thresholds above ``(nodes + max_colluding_nodes) / 2`` only.
        max_epsilon: largest privacy loss of a client of this node over all runs, >= 0; None: no limit.
        delta: delta of ``max_epsilon``, in (0, 1), default 1e-5.

    Raises:
        SettingError: A value is out of range, or is a limit of a mechanism that ``minimum`` does not require.
    """

    minimum: str = "none"
    max_clip: float | None = None
    min_noise_multiplier: float | None = None
    min_nodes_in_sum: int = 2
    max_colluding_nodes: int = 1
    max_epsilon: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        expected = f"one of {', '.join(PRIVACY_LEVELS)}"
        require(self.minimum in PRIVACY_LEVELS, "required_privacy.minimum", self.minimum, expected, "minimum: example")
        is_valid = is_number(self.delta, at_least=0, below=1) and self.delta > 0
        require(is_valid, "required_privacy.delta", self.delta, "a number in (0, 1)", "delta: 1.0e-5")
        for name, least in (("min_nodes_in_sum", 2), ("max_colluding_nodes", 0)):
            value, is_valid = getattr(self, name), is_count(getattr(self, name), at_least=least)
            expected = f"a whole number >= {least}"
            require(is_valid, f"required_privacy.{name}", value, expected, f"{name}: {least + 1}")
        for name in ("max_clip", "min_noise_multiplier", "max_epsilon"):
            value = getattr(self, name)
            is_valid = value is None or is_number(value, at_least=0)
            require(is_valid, f"required_privacy.{name}", value, "null, or a number >= 0", f"{name}: 1.0")
            is_unused = value is not None and self.minimum == "none"
            expected = "null, because required_privacy.minimum is none"
            require(not is_unused, f"required_privacy.{name}", value, expected, "minimum: example")

    def check(self, local: LocalSettings, privacy: Mapping[str, Any]) -> None:
        """Refuse a request with less privacy than required.

        Args:
            local: local settings of the request.
            privacy: settings of its privacy mechanism; empty for none.

        Raises:
            PolicyViolation: The mechanism is not the required one, or its clip norm or noise is outside the limits.
        """
        if self.minimum == "none":
            return
        clip, noise = _dp_sgd_values(local) if self.minimum == "example" else self._mechanism_values(privacy)
        if self.max_clip is not None and not clip <= self.max_clip:
            raise PolicyViolation(f"privacy={self.minimum} clips to {clip}; this node accepts at most {self.max_clip}")
        if self.min_noise_multiplier is not None and not noise >= self.min_noise_multiplier:
            value = f"the noise multiplier of privacy={self.minimum} is {noise}"
            raise PolicyViolation(f"{value}; this node accepts at least {self.min_noise_multiplier}")

    def check_threshold(self, threshold: int) -> None:
        """Refuse a request whose smallest masked sum has too few nodes.

        Args:
            threshold: smallest number of nodes in a sum of the request.

        Raises:
            PolicyViolation: The sum has fewer nodes than ``min_nodes_in_sum``.
        """
        if threshold < self.min_nodes_in_sum:
            raise PolicyViolation(
                f"a masked sum of this request may have {threshold} nodes; this node accepts at least "
                f"{self.min_nodes_in_sum} (required_privacy.min_nodes_in_sum); "
                f"try privacy.threshold={self.min_nodes_in_sum}"
            )

    def _mechanism_values(self, privacy: Mapping[str, Any]) -> tuple[float, float]:
        """Return clip norm and noise multiplier of the required mechanism."""
        kinds, lack = REQUIRED_MECHANISMS[self.minimum]
        kind = privacy.get("name")
        if kind not in kinds:
            raise PolicyViolation(
                f"updates of this request leave the node {lack}; this node requires privacy={' or '.join(kinds)}"
            )
        clip, noise = privacy.get("clip_norm"), privacy.get("noise_multiplier", 0.0)
        if clip is None or noise is None or not (is_number(clip) and is_number(noise)):
            raise PolicyViolation(f"privacy={kind} has clip_norm={clip} and noise_multiplier={noise}, expected numbers")
        return float(clip), float(noise)


def _dp_sgd_values(local: LocalSettings) -> tuple[float, float]:
    """Return clip norm and noise multiplier of DP-SGD."""
    if local.example_dp is None:
        raise PolicyViolation("the request trains without DP-SGD; this node requires privacy=example")
    return local.example_dp.clip, local.example_dp.noise_multiplier
