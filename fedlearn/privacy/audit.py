"""An audit: canaries that are in or out by the flip of a coin, and the epsilon that telling them apart refutes.

Shapes: M canaries, K clients in a block, D parameters laid flat.

Each canary pushes one parameter, that no other canary pushes, as hard as it can. What a mechanism releases is read at
these parameters. If it kept its claim, nobody could tell from there which canaries were in, except so often: being
right more often refutes the claim, and one run suffices, as a thousand coins are flipped in it.

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

SIGNIFICANCE = 0.05  # chance that a bound is above the truth, at most
CANARY_NORM = 1e3  # of a canary's update, before anything clips it: a clip that does not work shows


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """Who is in, and where each is looked for.

    Attributes:
        included_M: by the flip of a fair coin each.
        index_M: the parameter that each pushes; no two the same.
        is_replacement: whether one that is out pushes the other way instead of staying away: for claims on replacement.
    """

    included_M: np.ndarray
    index_M: np.ndarray
    is_replacement: bool = False

    @property
    def participants(self) -> np.ndarray:
        """Numbers of those that take part."""
        return np.arange(len(self.index_M)) if self.is_replacement else np.flatnonzero(self.included_M)

    @property
    def sign_M(self) -> np.ndarray:  # noqa: N802
        """Which way each pushes."""
        return np.where(self.included_M, 1.0, -1.0 if self.is_replacement else 0.0)

    def split_scores(self, scores_M: np.ndarray) -> Scores:
        """What was seen of each canary, by whether it was in."""
        return Scores(included=scores_M[self.included_M], excluded=scores_M[~self.included_M])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What canaries that were in scored, and those that were out; more means in."""

    included: np.ndarray
    excluded: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit has found.

    Attributes:
        epsilon_lower_bound: epsilon is at least this, with confidence ``1 - SIGNIFICANCE``.
        max_lower_bound: the largest bound that so many canaries can give.
        auc: area under the curve of true against false positives; 0.5 tells nothing.
        tpr: share of included canaries found where 1 % of the others are taken for included.
        assumption: what the bound takes the mechanism for.
    """

    epsilon_lower_bound: float
    max_lower_bound: float
    auc: float
    tpr: float
    assumption: str


def draw_canaries(num_canaries: int, num_parameters: int, *, seed: int, is_replacement: bool = False) -> Canaries:
    """Fair coins for ``num_canaries`` canaries, and a parameter for each of them; ``count <= num_parameters``."""
    rng = generator(seed, Purpose.CANARIES)
    included_M = rng.integers(2, size=num_canaries).astype(bool)
    place_M = rng.choice(num_parameters, num_canaries, replace=False)
    return Canaries(included_M=included_M, index_M=place_M, is_replacement=is_replacement)


def audit_scores(scores: Scores, *, delta: float, gaussian: bool) -> AuditResult:
    """The epsilon that scores refute.

    Args:
        scores: of canaries.
        delta: that the claim is made at, in (0, 1).
        gaussian: whether what was released is Gaussian noise on a sum, without sampling. Then the whole trade-off curve
            is known up to one number, and the audit sees more; else any (epsilon, delta) is allowed for.

    Raises:
        MissingExtra: jax-privacy is not installed.
    """
    auditor = _auditing().CanaryScoreAuditor
    seen, perfect = auditor(scores.included, scores.excluded), auditor(scores.included * 0 + 1, scores.excluded * 0)
    bound, most = (
        one.epsilon_one_run_fdp(SIGNIFICANCE, delta) if gaussian else one.epsilon_one_run(SIGNIFICANCE, delta)
        for one in (seen, perfect)
    )
    law = "a Gaussian mechanism" if gaussian else "any (epsilon, delta)-private mechanism"
    auc, tpr = float(seen.attack_auroc()), float(seen.tpr_at_given_fpr(0.01))
    return AuditResult(epsilon_lower_bound=float(bound), max_lower_bound=float(most), auc=auc, tpr=tpr, assumption=law)


def is_gaussian(ledger: Ledger, guarantee: PrivacyGuarantee) -> bool:
    """Return whether all releases together are one release with Gaussian noise: none of them is sampled.

    Integer noise of clients (Skellam, discrete Gaussian) is booked as `RenyiEvent` and counts: its sum spreads over
    hundreds of integers, so a thousand canaries cannot distinguish it from Gaussian noise. A mechanism with such noise
    states a noise multiplier.
    """
    events = [event for history in (ledger.federation, *ledger.histories) for event, _ in history]
    integers = guarantee.noise_multiplier is not None
    return all((isinstance(e, Event) and e.rate == 1) or (isinstance(e, RenyiEvent) and integers) for e in events)


class CanaryTrainer(TrainerWrapper):
    """A trainer whose clients are canaries: they train as ever, and send something else.

    Args:
        trainer: of the model.
        canaries: by number of client.
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
        """Zero: what a round releases is then the model, unrounded."""
        return np.zeros(self.layout.num_parameters, np.float32)

    def with_batching(self, batching: str) -> CanaryTrainer:
        """See `Trainer.with_batching`."""
        return CanaryTrainer(self.trainer.with_batching(batching), self.canaries)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """The updates of K clients, with ``+-LENGTH`` at each one's own parameter instead of what it learned."""
        updates = self.trainer.fit(request, rule, work)
        delta_KD = np.zeros((len(work), self.layout.num_parameters), np.float32)
        clients_K = updates.clients_K
        delta_KD[np.arange(len(work)), self.canaries.index_M[clients_K]] = CANARY_NORM * self.canaries.sign_M[clients_K]
        return replace(updates, delta_KD=asarray_like(delta_KD, updates.delta_KD))


class ObservingEngine(EngineWrapper):
    """An engine, and someone who listens to what leaves its clients.

    Args:
        engine: that carries out orders.
        on_updates: is given all updates as they are sent.
    """

    def __init__(self, engine: Engine, on_updates: Callable[[Updates], None]) -> None:
        super().__init__(engine)
        self.on_updates = on_updates

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Any]:
        """See `Engine.fit`."""
        for result in map(require_single_updates, self.engine.fit(request, strategy, cohort)):
            if isinstance(result, Updates):
                self.on_updates(result)
            yield result


class Observer:
    """Adds up what each canary's own upload holds at its own parameter."""

    def __init__(self, canaries: Canaries) -> None:
        self.index_M, self.observed_M = canaries.index_M, np.zeros(len(canaries.index_M))

    def __call__(self, updates: Updates) -> None:
        """Listen to one block."""
        rows_KD, clients_K = as_numpy(updates.delta_KD), updates.clients_K
        self.observed_M[clients_K] += rows_KD[np.arange(len(clients_K)), self.index_M[clients_K]]


def _auditing() -> Any:
    try:
        from jax_privacy import auditing
    except ImportError as missing:
        raise MissingExtra("an audit", "audit") from missing
    return auditing
