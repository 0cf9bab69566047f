"""The privacy guarantee that a strategy carries through the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fedlearn.core.privacy_ledger import Epsilon, Ledger
from fedlearn.errors import is_number, require

DEFAULT_WITHHELD = frozenset({"metrics", "examples"})
WITHHELD_NAMES = {"metrics": "training metrics", "examples": "example counts"}
UNITS = ("client", "example")


class Neighbors(StrEnum):
    """Difference between two data sets that a guarantee hides.

    A record that is replaced moves a sum twice as far as a record that is added, removed or set to zero.
    """

    ADD_OR_REMOVE = "add_or_remove"
    REPLACE = "replace"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """Release of one round, as input of a ledger.

    Attributes:
        round: round number, >= 1.
        clients: responding clients; before the round, the cohort.
        num_examples: training examples of each responding client; None before the round.
        num_steps: local steps of each responding client; None before the round.
        dropouts: clients that may have sent a response which did not arrive; they pay like responding clients.
    """

    round: int
    clients: tuple[int, ...]
    num_examples: tuple[int, ...] | None = None
    num_steps: tuple[int, ...] | None = None
    dropouts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrivacyGuarantee:
    """Privacy guarantee of a strategy, with the functions that account for it.

    A mechanism with other noise than Gaussian, or without clipping, leaves ``noise_multiplier`` or ``clip_norm`` at
    None and states its parameters in ``settings``.

    Attributes:
        kind: name of the mechanism, for example ``central``.
        unit: privacy unit, ``client`` or ``example``.
        adjacency: difference between two data sets that the guarantee hides, as text.
        neighbors: this difference for programs: `Neighbors.REPLACE` if a record of the unit is replaced.
        charge: ``(ledger, release) -> ledger``. It is called before a round with the largest possible release, and
            after the round with the actual release. A round that released nothing is not charged.
        epsilon_of: ``ledger -> epsilon``; returns None if the mechanism has no epsilon.
        sampling: assumption on the sampling of clients or examples, as text.
        delta: delta of the guarantee, in [0, 1); None if the mechanism has no epsilon.
        noise_multiplier: standard deviation of the Gaussian noise divided by the clip norm; None without such noise.
        clip_norm: largest L2 norm of a contribution; None without clipping.
        clip: ``fixed``, ``adaptive`` or ``per example``.
        max_epsilon: epsilon that no round may exceed; None for no limit.
        threshold: smallest number of parties whose sum secure aggregation opens; None without secure aggregation.
        encoding_digest: digest of all settings with which clients encode masked updates, noise included. All clients of
            a sum use the same settings. Empty without secure aggregation.
        withheld: values that stay at the clients because no noise covers them: ``metrics`` of training and numbers of
            ``examples``.
        not_covered: releases that the guarantee does not cover, each a phrase.
        warnings: warnings for the reader of a report, each a sentence.
        settings: further parameters of the mechanism as JSON values, for reports.
        initial_ledger: ledger that a run starts with: releases before the first round.
        supports_empty_rounds: True if a round without clients releases noise.
        holds_against_server: True if the upload of a client is private against the server. Then a request is charged
            before it goes out, because the server has the uploads of a round that fails.
        covers_extra_vectors: True if the guarantee holds for all vectors that a local rule sends beside the update.
            `Strategy` refuses such a local rule otherwise.
    """

    kind: str
    unit: str
    adjacency: str
    charge: Callable[[Ledger, Release], Ledger]
    epsilon_of: Callable[[Ledger], Epsilon | None]
    neighbors: Neighbors = Neighbors.ADD_OR_REMOVE
    sampling: str = "none assumed"
    delta: float | None = None
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    clip: str = "fixed"
    holds_against_server: bool = False
    max_epsilon: float | None = None
    threshold: int | None = None
    encoding_digest: bytes = b""
    withheld: frozenset[str] = DEFAULT_WITHHELD
    not_covered: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    initial_ledger: Ledger = field(default_factory=Ledger)
    supports_empty_rounds: bool = False
    covers_extra_vectors: bool = False

    def __post_init__(self) -> None:
        require(self.unit in UNITS, "unit", self.unit, f"one of {', '.join(UNITS)}", "unit='client'")
        fits = self.delta is None or is_number(self.delta, at_least=0, below=1)
        require(fits, "delta", self.delta, "None, or a number in [0, 1)", "delta=1e-5")
        known = self.withheld <= WITHHELD_NAMES.keys()
        require(known, "withheld", set(self.withheld), f"a set of {', '.join(WITHHELD_NAMES)}", "withheld=frozenset()")

    def to_json(self) -> dict[str, Any]:
        """Return the guarantee as JSON values, for ``summary.json`` and reports."""
        withheld = " and ".join(text for name, text in WITHHELD_NAMES.items() if name in self.withheld)
        secure = {} if self.threshold is None else {"threshold": self.threshold}
        return {
            "kind": self.kind,
            "unit": self.unit,
            "adjacency": self.adjacency,
            "sampling": self.sampling,
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "clip": self.clip,
            "budget": self.max_epsilon,
            "holds_against_server": self.holds_against_server,
            **secure,
            **self.settings,
            "withheld": withheld or "nothing",
            "not_covered": list(self.not_covered),
            "warnings": list(self.warnings),
        }

    def refusal_reason(self, ledger: Ledger, release: Release) -> str | None:
        """Return the reason to refuse a round that exceeds the budget; None for a round within the budget.

        Args:
            ledger: ledger before the round.
            release: largest possible release of the round.
        """
        if self.max_epsilon is None:
            return None
        before, after = self.epsilon_of(ledger), self.epsilon_of(self.charge(ledger, release))
        if before is None or after is None or after.value <= self.max_epsilon:
            return None
        now, delta = before.value, self.delta or 0.0
        effect = f"round {release.round} would bring epsilon to {after.value:.4g}"
        return f"{effect}, above privacy.epsilon={self.max_epsilon:g} at delta {delta:g} (now {now:.4g})"
