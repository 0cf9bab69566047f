"""Give the root client trusted examples, in simulations of strategies with a root dataset.

Shapes: K clients of the scenario.
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

    Args:
        data: federated data of the scenario.
        root: root client, and number of its examples; None keeps its own examples.
        seed: seed of the draw.

    Raises:
        SettingError: the clients have fewer training examples.
    """
    if root.num_examples is None:
        return data
    size = root.num_examples

    @lru_cache(maxsize=1)
    def root_examples() -> Examples:
        ends_K = np.cumsum([len(data.train(client)) for client in data.clients])
        expected = f"at most {ends_K[-1]}, the number of training examples of all clients"
        require(size <= ends_K[-1], "strategy.num_root_examples", size, expected, "strategy.num_root_examples=100")
        rows = np.sort(generator(seed, Purpose.ROOT).choice(ends_K[-1], size, replace=False))
        client_of = np.searchsorted(ends_K, rows, side="right")
        parts = [(data.train(data.clients[k]), rows[client_of == k] - ends_K[k]) for k in np.unique(client_of).tolist()]
        x, y = (np.concatenate([getattr(examples, name)[rows_k] for examples, rows_k in parts]) for name in ("x", "y"))
        return Examples(x, y)

    root_examples()
    return replace(data, train=lambda client: root_examples() if client == root.client else data.train(client))
