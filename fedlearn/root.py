"""Examples of the server's own, at a client that its operator runs.

Shapes: K clients in a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fedlearn.data.federated import FederatedData
from fedlearn.errors import FedlearnError, is_count, require
from fedlearn.records import ClientId, Examples
from fedlearn.seeds import Purpose, generator
from fedlearn.select import Selector


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """Where a server's root data lie, for strategies that trust nobody else (`Strategy.root`).

    Args:
        client: who holds them. It takes part in each round and trains as all others do; attacks spare it.
        examples: what a simulation lays there in the place of the client's own examples: so many of all clients', see
            `with_root`; None: its own are the root data.
    """

    client: ClientId = 0
    examples: int | None = None

    def __post_init__(self) -> None:
        require(is_count(self.client, at_least=0), "root_client", self.client, "a client's number", "root_client=0")
        expected = "null (the client's own), or a whole number >= 1"
        counts = self.examples is None or is_count(self.examples)
        require(counts, "root_examples", self.examples, expected, "root_examples=100")

    def beside(self, others: Selector) -> Selector:
        """Cohorts of ``others``, and the root client."""

        def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
            return [*{self.client, *others.choose(round, clients, rng)}]

        return Selector(choose=choose)

    def among(self, clients_K: np.ndarray) -> np.ndarray:
        """Which of a round's updates is the server's own, K booleans.

        Raises:
            FedlearnError: none is, so that there is nothing to trust.
        """
        is_root_K: np.ndarray = clients_K == self.client
        if not is_root_K.any():
            raise FedlearnError(f"client {self.client}, where the server's root data lie, sent no update")
        return is_root_K


def with_root(data: FederatedData, root: Root, *, seed: int) -> FederatedData:
    """The data, with ``root.examples`` drawn uniformly from all clients' training examples at the root client.

    Others keep what they have, the drawn examples included. Held-out examples stay as they are.

    Raises:
        SettingError: there are not so many examples.
    """
    if root.examples is None:
        return data
    size = root.examples

    @lru_cache(maxsize=1)
    def drawn() -> Examples:
        ends_K = np.cumsum([len(data.train(client)) for client in data.clients])
        expected = f"at most {ends_K[-1]}, which is what all clients have to train on"
        require(size <= ends_K[-1], "strategy.root_examples", size, expected, "strategy.root_examples=100")
        rows = np.sort(generator(seed, Purpose.ROOT).choice(ends_K[-1], size, replace=False))
        owners = np.searchsorted(ends_K, rows, side="right")
        parts = [(data.train(data.clients[k]), rows[owners == k] - ends_K[k]) for k in np.unique(owners).tolist()]
        x, y = (np.concatenate([getattr(own, name)[at] for own, at in parts]) for name in ("x", "y"))
        return Examples(x, y)

    drawn()
    return replace(data, train=lambda client: drawn() if client == root.client else data.train(client))
