"""Federated data: the examples of each client, loaded on request.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.task.with_metrics(self.metrics))

    def name(self, client: ClientId) -> str:
        """Return the name of a client, or its id as text."""
        return self.names.get(client, str(client))
