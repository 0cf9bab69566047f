"""A data set that lies at clients.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedlearn.core.records import ClientId, Examples

Task = Literal["binary", "multiclass", "regression", "ranking"]


@dataclass(frozen=True, kw_only=True)
class FederatedData:
    """Hold the examples of each client, loaded on request.

    Args:
        task: ``binary`` (y in {0, 1}), ``multiclass`` (y in 0..num_classes-1), ``regression``, or ``ranking``
            (y in {0, 1}; a client's held-out part is one list, to be put in order of the outputs).
        clients: ids, sized and indexable; ``range(1_000_000)`` costs nothing.
        train: the training examples of one client.
        test: the held-out examples of one client (may be empty).
        pooled_test: a held-out set of all clients together, where it is not just the union of their own parts.
        num_classes: 2 or more for classification, 1 for regression.
        names: what to call clients in tables and figures, e.g. hospitals; the id where absent.
        source: one line for the header: what the data are and where they came from.
        num_train: training examples of each client, as far as told, where the examples themselves are elsewhere.
    """

    task: Task
    clients: Sequence[ClientId]
    train: Callable[[ClientId], Examples]
    test: Callable[[ClientId], Examples]
    pooled_test: Callable[[], Examples] | None = None
    num_classes: int = 2
    names: Mapping[ClientId, str] = field(default_factory=dict)
    source: str = ""
    num_train: Mapping[ClientId, int] | None = None

    def name(self, client: ClientId) -> str:
        """What to call a client."""
        return self.names.get(client, str(client))
