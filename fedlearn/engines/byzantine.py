"""An engine some of whose clients are malicious: it gathers what the cohort sends and rewrites what they send.

Shapes: K clients in a block, H honest clients of a round, F malicious ones, D parameters laid flat.

It knows nothing of the strategy. Client halves of stages have been applied when updates are forged, so that a malicious
client is bound by no clip; what it keeps for itself and what it sends besides its update are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.records import ClientId, Failure, Request, Updates
from fedlearn.loop.base_engine import require_single_updates
from fedlearn.loop.protocols import Engine
from fedlearn.loop.wrappers import EngineWrapper
from fedlearn.robust.poisoning import AttackView, Poisoning


class ByzantineEngine(EngineWrapper):
    """Wrap an engine and replace the updates of malicious clients by those of a poisoning.

    Args:
        engine: that hands over updates, not folds.
        poisoning: with ``forge``.
        malicious_clients: the malicious clients.
    """

    def __init__(self, engine: Engine, poisoning: Poisoning, malicious_clients: frozenset[ClientId]) -> None:
        super().__init__(engine)
        self.poisoning, self.malicious_clients = poisoning, malicious_clients

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort, wait for all of it, forge. A round without honest updates is left alone."""
        results = [require_single_updates(result) for result in self.engine.fit(request, strategy, cohort)]
        blocks = [result for result in results if isinstance(result, Updates)]
        yield from (result for result in results if not isinstance(result, Updates))
        yield from self._forged(request, blocks)

    def _forged(self, order: Request, blocks: Sequence[Updates]) -> Iterator[Updates]:
        bad = [np.isin(block.clients_K, list(self.malicious_clients)) for block in blocks]
        own = [as_numpy(block.delta_KD)[bad_K] for block, bad_K in zip(blocks, bad, strict=True)]
        honest = [as_numpy(block.delta_KD)[~bad_K] for block, bad_K in zip(blocks, bad, strict=True)]
        if not sum(map(len, own)) or not sum(map(len, honest)):
            yield from blocks
            return
        scene = AttackView(
            honest_HD=np.concatenate(honest).astype(np.float64),
            malicious_FD=np.concatenate(own).astype(np.float64),
            round=order.round,
            seed=order.seed,
        )
        assert self.poisoning.forge is not None
        forged_FD = np.broadcast_to(self.poisoning.forge(scene), scene.malicious_FD.shape)
        for block, bad_K in zip(blocks, bad, strict=True):
            here, forged_FD = forged_FD[: bad_K.sum()], forged_FD[bad_K.sum() :]
            delta_KD = as_numpy(block.delta_KD).copy()
            delta_KD[bad_K] = here
            yield replace(block, delta_KD=asarray_like(delta_KD, block.delta_KD))
