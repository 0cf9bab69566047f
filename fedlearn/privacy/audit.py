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

from fedlearn.arrays import as_numpy, like
from fedlearn.engines.base import Engine
from fedlearn.errors import MissingExtra
from fedlearn.layout import Layout
from fedlearn.local import LocalRule
from fedlearn.privacy.ledger import Ledger
from fedlearn.records import Array, ClientId, Order, Updates, Work
from fedlearn.seeds import Purpose, generator
from fedlearn.strategy import Strategy
from fedlearn.trainers.base import Trainer

SIGNIFICANCE = 0.05  # chance that a bound is above the truth, at most
LENGTH = 1e3  # of a canary's update, before anything clips it: a clip that does not work shows


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """Who is in, and where each is looked for.

    Attributes:
        included_M: by the flip of a fair coin each.
        place_M: the parameter that each pushes; no two the same.
        opposed: whether one that is out pushes the other way instead of staying away: for claims on replacement.
    """

    included_M: np.ndarray
    place_M: np.ndarray
    opposed: bool = False

    @property
    def present(self) -> np.ndarray:
        """Numbers of those that take part."""
        return np.arange(len(self.place_M)) if self.opposed else np.flatnonzero(self.included_M)

    @property
    def push_M(self) -> np.ndarray:  # noqa: N802
        """Which way each pushes."""
        return np.where(self.included_M, 1.0, -1.0 if self.opposed else 0.0)

    def told_apart(self, seen_M: np.ndarray) -> Scores:
        """What was seen of each canary, by whether it was in."""
        return Scores(included=seen_M[self.included_M], excluded=seen_M[~self.included_M])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What canaries that were in scored, and those that were out; more means in."""

    included: np.ndarray
    excluded: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an audit has found.

    Attributes:
        bound: epsilon is at least this, with confidence ``1 - SIGNIFICANCE``.
        most: the largest bound that so many canaries can give.
        auc: area under the curve of true against false positives; 0.5 tells nothing.
        tpr: share of included canaries found where 1 % of the others are taken for included.
        law: what the bound takes the mechanism for.
    """

    bound: float
    most: float
    auc: float
    tpr: float
    law: str


def flip(count: int, num_parameters: int, *, seed: int, opposed: bool = False) -> Canaries:
    """Fair coins for ``count`` canaries, and a parameter for each of them; ``count <= num_parameters``."""
    rng = generator(seed, Purpose.CANARIES)
    included_M = rng.integers(2, size=count).astype(bool)
    place_M = rng.choice(num_parameters, count, replace=False)
    return Canaries(included_M=included_M, place_M=place_M, opposed=opposed)


def examine(scores: Scores, *, delta: float, gaussian: bool) -> Finding:
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
    return Finding(bound=float(bound), most=float(most), auc=auc, tpr=tpr, law=law)


def is_gaussian(ledger: Ledger) -> bool:
    """Whether all that was paid for is Gaussian noise without sampling, so that all of it together is as well.

    Integer noise of clients (Skellam, discrete Gaussian) counts: its sum spreads over hundreds of integers, where a
    thousand canaries cannot tell it from Gaussian noise.
    """
    return all(event.rate == 1 for history in (ledger.federation, *ledger.histories) for event, _ in history)


class CanaryTrainer:
    """A trainer whose clients are canaries: they train as ever, and send something else.

    Args:
        trainer: of the model.
        canaries: by number of client.
    """

    def __init__(self, trainer: Trainer, canaries: Canaries) -> None:
        self.trainer, self.canaries = trainer, canaries

    @property
    def framework(self) -> str:  # noqa: D102
        return self.trainer.framework

    @property
    def device(self) -> str:  # noqa: D102
        return self.trainer.device

    @property
    def layout(self) -> Layout:  # noqa: D102
        return self.trainer.layout

    @property
    def private(self) -> bool:  # noqa: D102
        return False

    def init(self, seed: int) -> np.ndarray:
        """Zero: what a round releases is then the model, unrounded."""
        return np.zeros(self.layout.num_parameters, np.float32)

    def batched(self, batching: str) -> CanaryTrainer:
        """See `Trainer.batched`."""
        return CanaryTrainer(self.trainer.batched(batching), self.canaries)

    def batching_of(self, num_clients: int, num_examples: int) -> str:
        """See `Trainer.batching_of`."""
        return self.trainer.batching_of(num_clients, num_examples)

    def fit(self, order: Order, rule: LocalRule, work: Sequence[Work]) -> Updates:
        """The updates of K clients, with ``+-LENGTH`` at each one's own parameter instead of what it learned."""
        updates = self.trainer.fit(order, rule, work)
        delta_KD = np.zeros((len(work), self.layout.num_parameters), np.float32)
        clients_K = updates.clients_K
        delta_KD[np.arange(len(work)), self.canaries.place_M[clients_K]] = LENGTH * self.canaries.push_M[clients_K]
        return replace(updates, delta_KD=like(delta_KD, updates.delta_KD))

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """See `Trainer.predict`."""
        return self.trainer.predict(params_D, x)


class Overheard:
    """An engine, and someone who listens to what leaves its clients.

    Args:
        engine: that carries out orders.
        listen: is given all updates as they are sent.
    """

    def __init__(self, engine: Engine, listen: Callable[[Updates], None]) -> None:
        self.engine, self.listen = engine, listen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def fit(self, order: Order, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Any]:
        """See `Engine.fit`."""
        for result in self.engine.fit(order, strategy, cohort):
            if isinstance(result, Updates):
                self.listen(result)
            yield result


class Ear:
    """Adds up what each canary's own upload holds at its own parameter."""

    def __init__(self, canaries: Canaries) -> None:
        self.place_M, self.heard_M = canaries.place_M, np.zeros(len(canaries.place_M))

    def __call__(self, updates: Updates) -> None:
        """Listen to one block."""
        rows_KD, clients_K = as_numpy(updates.delta_KD), updates.clients_K
        self.heard_M[clients_K] += rows_KD[np.arange(len(clients_K)), self.place_M[clients_K]]


def _auditing() -> Any:
    try:
        from jax_privacy import auditing
    except ImportError as missing:
        raise MissingExtra("an audit", "audit") from missing
    return auditing
