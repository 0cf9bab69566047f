"""An engine some of whose clients are malicious: it gathers what the cohort sends and rewrites what they send.

Shapes: K clients in a block, H honest clients of a round, F malicious ones, D parameters laid flat.

It knows nothing of the strategy. Client halves of stages have been applied when updates are forged, so that a malicious
client is bound by no clip; what it keeps for itself and what it sends besides its update are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fedlearn.aggregate import Gathered
from fedlearn.arrays import as_numpy, like
from fedlearn.byzantine import Attack, Scene
from fedlearn.engines.base import Engine
from fedlearn.layout import Layout
from fedlearn.records import Array, ClientId, Failure, Memory, Order, Predictions, Tally, Updates
from fedlearn.strategy import Strategy


class AttackedEngine:
    """Carries orders out as another engine does, and sends what an attack has malicious clients send.

    Args:
        engine: that hands over updates, not folds.
        attack: with ``forge``.
        who: the malicious clients.
    """

    deployed = False

    def __init__(self, engine: Engine, attack: Attack, who: frozenset[ClientId]) -> None:
        self.engine, self.attack, self.who = engine, attack, who
        self.clients: Sequence[ClientId] = engine.clients
        self.layout: Layout = engine.layout
        self.memories: dict[ClientId, Memory] = engine.memories

    def fit(
        self, order: Order, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | Gathered | Failure]:
        """Train the cohort, wait for all of it, forge. A round without honest updates is left alone."""
        results = list(self.engine.fit(order, strategy, cohort))
        blocks = [result for result in results if isinstance(result, Updates)]
        yield from (result for result in results if not isinstance(result, Updates))
        yield from self._forged(order, blocks)

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], own: Strategy | None = None
    ) -> Iterator[Predictions | Tally | Failure]:
        """As the other engine."""
        return self.engine.evaluate(params_D, cohort, own)

    def describe(self, cohort_size: int) -> str:
        """As the other engine."""
        return self.engine.describe(cohort_size)

    def close(self) -> None:
        """The other engine."""
        self.engine.close()

    def _forged(self, order: Order, blocks: Sequence[Updates]) -> Iterator[Updates]:
        bad = [np.isin(block.clients_K, list(self.who)) for block in blocks]
        own = [as_numpy(block.delta_KD)[bad_K] for block, bad_K in zip(blocks, bad, strict=True)]
        honest = [as_numpy(block.delta_KD)[~bad_K] for block, bad_K in zip(blocks, bad, strict=True)]
        if not sum(map(len, own)) or not sum(map(len, honest)):
            yield from blocks
            return
        scene = Scene(
            honest_HD=np.concatenate(honest).astype(np.float64),
            own_FD=np.concatenate(own).astype(np.float64),
            round=order.round,
            seed=order.seed,
        )
        assert self.attack.forge is not None
        forged_FD = np.broadcast_to(self.attack.forge(scene), scene.own_FD.shape)
        for block, bad_K in zip(blocks, bad, strict=True):
            here, forged_FD = forged_FD[: bad_K.sum()], forged_FD[bad_K.sum() :]
            delta_KD = as_numpy(block.delta_KD).copy()
            delta_KD[bad_K] = here
            yield replace(block, delta_KD=like(delta_KD, block.delta_KD))
