"""Audit a privacy guarantee with canaries in one run, and compute a lower bound on epsilon.

Shapes: M canaries, K clients in a block, D parameters.

A fair coin decides for each canary if it is included. Each included canary sends a large update of its own parameter.
The audit scores each canary by the released value of this parameter. A mechanism with a small epsilon limits the
accuracy of guesses from these scores. A higher accuracy refutes the guarantee. One run is enough, because it contains
many independent coins.

References: Steinke, Nasr, Jagielski, *Privacy Auditing with One (1) Training Run*, NeurIPS 2023, arXiv:2305.08846;
Mahloujifar, Melis, Chaudhuri, *Auditing f-Differential Privacy in One Run*, 2024, arXiv:2410.22235.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.privacy_ledger import Event, Ledger, RenyiEvent
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, ClientWork, Request, Updates
from fedlearn.errors import MissingExtra
from fedlearn.loop.base_engine import require_single_updates
from fedlearn.loop.protocols import Engine, Trainer
from fedlearn.loop.wrappers import EngineWrapper, TrainerWrapper

SIGNIFICANCE = 0.05  # largest probability that a lower bound is above the true epsilon
CANARY_NORM = 1e3  # norm of a canary's update before clipping; large, so that the audit detects missing clipping


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """Coins and parameters of the canaries.

    Attributes:
        included_M: result of a fair coin for each canary, bool, ``(M,)``.
        index_M: index of the parameter of each canary, distinct, ``(M,)``.
        is_replacement: if True, an excluded canary takes part with the opposite sign instead of being absent. This
            suits guarantees for the replacement of a client.
        changed: canary whose contribution is changed: blank, or of the opposite sign for ``is_replacement``. Two runs
            that differ in this value measure the influence of one client. None for no change.
    """

    included_M: np.ndarray
    index_M: np.ndarray
    is_replacement: bool = False
    changed: int | None = None

    @property
    def participants(self) -> np.ndarray:
        """Indices of the canaries that take part, ascending."""
        return np.arange(len(self.index_M)) if self.is_replacement else np.flatnonzero(self.included_M)

    @property
    def sign_M(self) -> np.ndarray:  # noqa: N802
        """Signs of the updates of the canaries; 0 for an absent canary."""
        sign_M = np.where(self.included_M, 1.0, -1.0 if self.is_replacement else 0.0)
        if self.changed is not None:
            sign_M[self.changed] *= -1.0 if self.is_replacement else 0.0
        return sign_M

    def split_scores(self, scores_M: np.ndarray) -> Scores:
        """Split the scores ``(M,)`` into those for included and for excluded canaries."""
        return Scores(included=scores_M[self.included_M], excluded=scores_M[~self.included_M])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of included and of excluded canaries; higher scores mean inclusion."""

    included: np.ndarray
    excluded: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Result of an audit.

    Attributes:
        epsilon_lower_bound: lower bound on epsilon, with confidence ``1 - SIGNIFICANCE``.
        max_lower_bound: largest possible bound for this number of canaries.
        auc: area under the ROC curve, in [0, 1]; 0.5 for random guesses.
        tpr: true positive rate at a false positive rate of 1 %, in [0, 1].
        assumption: class of mechanisms for which the bound is valid, as text.
    """

    epsilon_lower_bound: float
    max_lower_bound: float
    auc: float
    tpr: float
    assumption: str


def draw_canaries(num_canaries: int, num_parameters: int, *, seed: int, is_replacement: bool = False) -> Canaries:
    """Draw a fair coin and a distinct parameter for each canary.

    Args:
        num_canaries: M, at most ``num_parameters``.
        num_parameters: D.
        seed: seed of the run.
        is_replacement: see `Canaries`.
    """
    rng = generator(seed, Purpose.CANARIES)
    included_M = rng.integers(2, size=num_canaries).astype(bool)
    index_M = rng.choice(num_parameters, num_canaries, replace=False)
    return Canaries(included_M=included_M, index_M=index_M, is_replacement=is_replacement)


def audit_scores(scores: Scores, *, delta: float, gaussian: bool) -> AuditResult:
    """Return a lower bound on epsilon from the scores of canaries.

    Args:
        scores: scores of all canaries.
        delta: delta of the guarantee, in (0, 1).
        gaussian: True if the release is a sum with Gaussian noise, without sampling. Its trade-off curve has one
            unknown number, so the bound is larger. Otherwise the bound is valid for any (epsilon, delta)-private
            mechanism.

    Raises:
        MissingExtra: The package jax-privacy is not installed.
    """
    auditor = _auditing().CanaryScoreAuditor
    observed, perfect = auditor(scores.included, scores.excluded), auditor(scores.included * 0 + 1, scores.excluded * 0)
    bound, max_bound = (
        audit.epsilon_one_run_fdp(SIGNIFICANCE, delta) if gaussian else audit.epsilon_one_run(SIGNIFICANCE, delta)
        for audit in (observed, perfect)
    )
    law = "a Gaussian mechanism" if gaussian else "any (epsilon, delta)-private mechanism"
    auc, tpr = float(observed.attack_auroc()), float(observed.tpr_at_given_fpr(0.01))
    return AuditResult(
        epsilon_lower_bound=float(bound), max_lower_bound=float(max_bound), auc=auc, tpr=tpr, assumption=law
    )


def is_gaussian(ledger: Ledger, guarantee: PrivacyGuarantee) -> bool:
    """Return whether all releases together are one release with Gaussian noise and without sampling.

    Integer noise of clients (Skellam, discrete Gaussian) counts as Gaussian noise; the ledger books it as `RenyiEvent`.
    Its sum spreads over hundreds of integers, so a thousand canaries cannot distinguish it from Gaussian noise. A
    mechanism with such noise states a noise multiplier.
    """
    events = [event for history in (ledger.federation, *ledger.histories) for event, _ in history]
    integers = guarantee.noise_multiplier is not None
    return all((isinstance(e, Event) and e.rate == 1) or (isinstance(e, RenyiEvent) and integers) for e in events)


class CanaryTrainer(TrainerWrapper):
    """Trainer whose clients are canaries: they train normally, but send canary updates.

    Args:
        trainer: trainer of the model.
        canaries: canaries; client k is canary k.
    """

    def __init__(self, trainer: Trainer, canaries: Canaries) -> None:
        super().__init__(trainer)
        self.canaries = canaries

    @property
    def supports_dp_sgd(self) -> bool:  # noqa: D102
        return False

    @property
    def initialization(self) -> str:  # noqa: D102
        return "weights are zero"

    def init(self, seed: int) -> np.ndarray:
        """Return zeros. The model after the round is then exactly the released update, without rounding."""
        return np.zeros(self.layout.num_parameters, np.float32)

    def with_batching(self, batching: str) -> CanaryTrainer:
        """Return this trainer with another batching; see `Trainer.with_batching`."""
        return CanaryTrainer(self.trainer.with_batching(batching), self.canaries)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, and replace each update by ``CANARY_NORM`` with a sign at the parameter of its canary."""
        updates = self.trainer.fit(request, rule, work)
        delta_KD = np.zeros((len(work), self.layout.num_parameters), np.float32)
        clients_K = updates.clients_K
        delta_KD[np.arange(len(work)), self.canaries.index_M[clients_K]] = CANARY_NORM * self.canaries.sign_M[clients_K]
        return replace(updates, delta_KD=asarray_like(delta_KD, updates.delta_KD))


class ObservingEngine(EngineWrapper):
    """Engine that passes all updates of its clients to an observer.

    Args:
        engine: wrapped engine.
        on_updates: function that receives each block of updates before aggregation.
    """

    def __init__(self, engine: Engine, on_updates: Callable[[Updates], None]) -> None:
        super().__init__(engine)
        self.on_updates = on_updates

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Any]:
        """Pass each block of updates to the observer, and yield it; see `Engine.fit`."""
        for result in map(require_single_updates, self.engine.fit(request, strategy, cohort)):
            if isinstance(result, Updates):
                self.on_updates(result)
            yield result


class Observer:
    """Observer that adds up the value of each canary's parameter in its own uploads.

    Args:
        position_M: position of the parameter of each canary in an upload, ``(M,)``. An upload lacks the parameters that
            clients do not share.

    Attributes:
        observed_M: sums, ``(M,)``.
        first_client: first client whose upload arrived; None without uploads.
        first_upload_D: its upload.
    """

    def __init__(self, position_M: np.ndarray) -> None:
        self.position_M, self.observed_M = position_M, np.zeros(len(position_M))
        self.first_client: int | None = None
        self.first_upload_D: np.ndarray | None = None

    def __call__(self, updates: Updates) -> None:
        """Add the uploads of one block of clients."""
        rows_KD, clients_K = as_numpy(updates.delta_KD), updates.clients_K
        if self.first_client is None:
            self.first_client, self.first_upload_D = int(clients_K[0]), rows_KD[0].copy()
        self.observed_M[clients_K] += rows_KD[np.arange(len(clients_K)), self.position_M[clients_K]]


def _auditing() -> Any:
    try:
        from jax_privacy import auditing
    except ImportError as missing:
        raise MissingExtra("an audit", "audit") from missing
    return auditing
