"""Films that a user has not seen, other ones in each round.

Shapes: M items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.data.federated import FederatedData
from fedlearn.local import LocalRule
from fedlearn.records import ClientId, Examples, Order, Updates, Work
from fedlearn.seeds import Purpose, generator
from fedlearn.trainers.base import AroundTrainer, Trainer, round_of


class FreshNegatives(AroundTrainer):
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

    def batched(self, batching: str) -> FreshNegatives:
        """The same around the trainer batched so."""
        return FreshNegatives(self.trainer.batched(batching), self.data, num_items=self.num_items)

    def fit(self, order: Order, rule: LocalRule, work: Sequence[Work]) -> Updates:
        """Train K clients with new negatives; see `Trainer.fit`."""
        return self.trainer.fit(order, rule, [self._renewed(order, one) for one in work])

    def _renewed(self, order: Order, one: Work) -> Work:
        if one.client not in self.data.clients:
            return one
        liked = one.examples.x[one.examples.y == 1]
        rng = generator(order.seed, Purpose.AUGMENT, round=round_of(order, one), client=one.client)
        others = self._unseen(one.client, liked, len(one.examples) - len(liked), rng)
        return one._replace(examples=labelled(liked, others))

    def _unseen(self, client: ClientId, liked: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        rest = np.setdiff1d(np.arange(self.num_items), np.concatenate([liked, self.data.test(client).x]))
        return rng.choice(rest, count) if count else rest[:0]


def labelled(liked: np.ndarray, others: np.ndarray) -> Examples:
    """Items of target 1, then of target 0."""
    return Examples(np.concatenate([liked, others]).astype(np.int32), np.repeat([1, 0], [len(liked), len(others)]))
