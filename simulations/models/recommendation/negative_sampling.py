"""Negative sampling: each round draws new items that a user has not rated.

Shapes: M items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, ClientWork, Examples, Request, Updates
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.wrappers import TrainerWrapper
from fedlearn.trainers.batching import round_of


class NegativeSamplingTrainer(TrainerWrapper):
    """Train on each user's positive items and on negative items that are drawn anew in each round.

    The number of negative items equals the number of negatives in the user's data.

    Args:
        trainer: trainer that receives the new examples.
        data: data of a ranking task; examples of target 1 are positive, examples of target 0 negative.
        num_items: number of items M.

    *Guarantees*: No item of a user's held-out list is used for training, as a positive or as a negative. Draws
    depend on (seed, round, client) only, not on the framework. Clients that are not in ``data``, such as the client
    of a baseline, train on their examples unchanged. With DP-SGD all clients do, because a drawn negative item would
    depend on other examples.
    """

    def __init__(self, trainer: Trainer, data: FederatedData, *, num_items: int) -> None:
        super().__init__(trainer)
        self.data, self.num_items = data, num_items

    def with_batching(self, batching: str) -> NegativeSamplingTrainer:
        """Return a copy whose inner trainer has this batching."""
        return NegativeSamplingTrainer(self.trainer.with_batching(batching), self.data, num_items=self.num_items)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients with new negatives; see `Trainer.fit`."""
        return self.trainer.fit(request, rule, [self._resample_negatives(request, item) for item in work])

    def _resample_negatives(self, request: Request, work: ClientWork) -> ClientWork:
        if work.client not in self.data.clients or request.local.example_dp:
            return work
        positives = work.examples.x[work.examples.y == 1]
        rng = generator(request.seed, Purpose.AUGMENT, round=round_of(request, work), client=work.client)
        negatives = self._draw_negatives(work.client, positives, len(work.examples) - len(positives), rng)
        return work._replace(examples=label_items(positives, negatives))

    def _draw_negatives(
        self, client: ClientId, positives: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        candidates = np.setdiff1d(np.arange(self.num_items), np.concatenate([positives, self.data.test(client).x]))
        return rng.choice(candidates, count) if count else candidates[:0]


def label_items(positives: np.ndarray, negatives: np.ndarray) -> Examples:
    """Return examples of target 1 for the positives, then of target 0 for the negatives."""
    return Examples(
        np.concatenate([positives, negatives]).astype(np.int32), np.repeat([1, 0], [len(positives), len(negatives)])
    )
