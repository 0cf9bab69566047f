"""Federated data: the examples of each client, loaded on request.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedlearn.core.metric import Metric
from fedlearn.core.records import ClientId, Examples
from fedlearn.core.tasks import TaskField


@dataclass(frozen=True, kw_only=True)
class FederatedData:
    """Data set that is divided among clients.

    Args:
        task: a `Task`, or the name of a shipped task, e.g. ``binary`` (y in {0, 1}), ``multiclass`` (y in
            0..num_classes-1) or ``regression``. The attribute is a `Task`.
        clients: sequence of client ids, e.g. ``range(1_000_000)``, which needs no memory.
        train: function that returns the training examples of a client.
        test: function that returns the held-out examples of a client, possibly none.
        pooled_test: function that returns a held-out set of all clients; None for the union of their held-out parts.
        num_classes: number of classes, labels or values of a target; 1 for regression.
        names: names of clients for tables and figures, e.g. hospitals; other clients are named by their ids.
        source: content and origin of the data in one line, for the header.
        num_train: number of training examples of each client, if the examples are on other machines and the number is
            known; else None.
        metrics: metrics of the user, in addition to the metrics of the task. They become metrics of ``task``.
        held_out_clients: ids of clients that never train, and are not in ``clients``. Their examples from ``test`` have
            an evaluation of their own.
    """

    task: TaskField = TaskField()  # noqa: RUF009 - a descriptor, without a default
    clients: Sequence[ClientId]
    train: Callable[[ClientId], Examples]
    test: Callable[[ClientId], Examples]
    pooled_test: Callable[[], Examples] | None = None
    num_classes: int = 2
    names: Mapping[ClientId, str] = field(default_factory=dict)
    source: str = ""
    num_train: Mapping[ClientId, int] | None = None
    metrics: Sequence[Metric] = ()
    held_out_clients: Sequence[ClientId] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.task.with_metrics(self.metrics))

    def hold_out(self, held_out_clients: Collection[ClientId]) -> FederatedData:
        """Return these data with some clients that never train.

        >>> from fedlearn import from_arrays
        >>> data = from_arrays([[0.0], [1.0], [2.0]], [0, 1, 1], task="binary", assignment=[0, 1, 2])
        >>> data.hold_out([1]).clients
        [0, 2]
        """
        if not held_out_clients:
            return self
        clients = [client for client in self.clients if client not in held_out_clients]
        return replace(self, clients=clients, held_out_clients=sorted(held_out_clients))

    def name(self, client: ClientId) -> str:
        """Return the name of a client, or its id as text."""
        return self.names.get(client, str(client))
