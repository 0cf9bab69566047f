"""Films that a user has not seen, other ones in each round.

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
    """Trains on what each user has seen beside as many others as its data hold, drawn anew in each round.

    Args:
        trainer: the one within.
        data: of a ranking: examples of target 1 are seen, the others are not.
        num_items: M.

    *Guarantees*: no item of a user's held-out list is trained on, neither way. Draws follow from (seed, round, client)
    alone and come before any framework. A client that the data do not know (a baseline's) trains on what it is given.
    """

    def __init__(self, trainer: Trainer, data: FederatedData, *, num_items: int) -> None:
        super().__init__(trainer)
        self.data, self.num_items = data, num_items

    def with_batching(self, batching: str) -> NegativeSamplingTrainer:
        """The same around the trainer batched so."""
        return NegativeSamplingTrainer(self.trainer.with_batching(batching), self.data, num_items=self.num_items)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients with new negatives; see `Trainer.fit`."""
        return self.trainer.fit(request, rule, [self._renewed(request, one) for one in work])

    def _renewed(self, order: Request, one: ClientWork) -> ClientWork:
        if one.client not in self.data.clients:
            return one
        liked = one.examples.x[one.examples.y == 1]
        rng = generator(order.seed, Purpose.AUGMENT, round=round_of(order, one), client=one.client)
        others = self._unseen(one.client, liked, len(one.examples) - len(liked), rng)
        return one._replace(examples=label_items(liked, others))

    def _unseen(self, client: ClientId, liked: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        rest = np.setdiff1d(np.arange(self.num_items), np.concatenate([liked, self.data.test(client).x]))
        return rng.choice(rest, count) if count else rest[:0]


def label_items(positives: np.ndarray, negatives: np.ndarray) -> Examples:
    """Items of target 1, then of target 0."""
    return Examples(
        np.concatenate([positives, negatives]).astype(np.int32), np.repeat([1, 0], [len(positives), len(negatives)])
    )
