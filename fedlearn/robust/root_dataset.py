"""Root datasets in simulations: trusted examples at the root client.

Shapes: K clients in a round.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from fedlearn.algorithm.strategy import RootDataset
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Examples
from fedlearn.errors import require


def with_root_dataset(data: FederatedData, root: RootDataset, *, seed: int) -> FederatedData:
    """Return the data with ``root.num_examples`` training examples at the root client.

    They are drawn uniformly from the training examples of all clients. The other clients keep their examples,
    including the drawn ones. Held-out examples do not change.

    Raises:
        SettingError: there are fewer examples.
    """
    if root.num_examples is None:
        return data
    size = root.num_examples

    @lru_cache(maxsize=1)
    def drawn() -> Examples:
        ends_K = np.cumsum([len(data.train(client)) for client in data.clients])
        expected = f"at most {ends_K[-1]}, which is what all clients have to train on"
        require(size <= ends_K[-1], "strategy.num_root_examples", size, expected, "strategy.num_root_examples=100")
        rows = np.sort(generator(seed, Purpose.ROOT).choice(ends_K[-1], size, replace=False))
        owners = np.searchsorted(ends_K, rows, side="right")
        parts = [(data.train(data.clients[k]), rows[owners == k] - ends_K[k]) for k in np.unique(owners).tolist()]
        x, y = (np.concatenate([getattr(own, name)[at] for own, at in parts]) for name in ("x", "y"))
        return Examples(x, y)

    drawn()
    return replace(data, train=lambda client: drawn() if client == root.client else data.train(client))
