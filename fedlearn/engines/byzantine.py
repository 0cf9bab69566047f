"""Simulate malicious clients: collect the updates of a cohort, and replace the updates of malicious clients.

Shapes: K clients in a block, H honest and F malicious clients of a round, D parameters.

The engine does not know the strategy. It forges updates after the client halves of the stages, so no clipping limits a
forged update. The client state and the further values of a malicious client are not changed.
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
    """Wrap an engine and replace the updates of malicious clients by forged updates.

    Args:
        engine: engine that returns updates, not partial aggregates.
        poisoning: poisoning with a function ``forge``.
        malicious_clients: ids of the malicious clients.
    """

    def __init__(self, engine: Engine, poisoning: Poisoning, malicious_clients: frozenset[ClientId]) -> None:
        super().__init__(engine)
        self.poisoning, self.malicious_clients = poisoning, malicious_clients

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the whole cohort and forge updates. A round without honest updates is not changed."""
        results = [require_single_updates(result) for result in self.engine.fit(request, strategy, cohort)]
        blocks = [result for result in results if isinstance(result, Updates)]
        yield from (result for result in results if not isinstance(result, Updates))
        yield from self._forge(request, blocks)

    def _forge(self, request: Request, blocks: Sequence[Updates]) -> Iterator[Updates]:
        bad = [np.isin(block.clients_K, list(self.malicious_clients)) for block in blocks]
        malicious = [as_numpy(block.delta_KD)[bad_K] for block, bad_K in zip(blocks, bad, strict=True)]
        honest = [as_numpy(block.delta_KD)[~bad_K] for block, bad_K in zip(blocks, bad, strict=True)]
        if not sum(map(len, malicious)) or not sum(map(len, honest)):
            yield from blocks
            return
        view = AttackView(
            honest_HD=np.concatenate(honest).astype(np.float64),
            malicious_FD=np.concatenate(malicious).astype(np.float64),
            round=request.round,
            seed=request.seed,
        )
        assert self.poisoning.forge is not None
        forged_FD = np.broadcast_to(self.poisoning.forge(view), view.malicious_FD.shape)
        for block, bad_K in zip(blocks, bad, strict=True):
            forged_of_block, forged_FD = forged_FD[: bad_K.sum()], forged_FD[bad_K.sum() :]
            delta_KD = as_numpy(block.delta_KD).copy()
            delta_KD[bad_K] = forged_of_block
            yield replace(block, delta_KD=asarray_like(delta_KD, block.delta_KD))
