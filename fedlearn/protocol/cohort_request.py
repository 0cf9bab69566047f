"""Describe a request to a cohort, before an `Exchange` divides it among the nodes.

Shapes: C model outputs, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.layout import Layout
from fedlearn.core.metrics import evaluate_client
from fedlearn.core.records import Array, ClientEvaluation, ClientId, Failure, Predictions, Request, Updates
from fedlearn.core.serialization import Payload
from fedlearn.core.tasks import Task
from fedlearn.protocol.membership import Member
from fedlearn.protocol.messages import RequestKind
from fedlearn.protocol.responses import EvaluationReader, ResponseReader
from fedlearn.protocol.training_order import pack_client_models, pack_order
from fedlearn.protocol.updates import UpdateReader

Result = TypeVar("Result")


def _no_content(clients: Sequence[ClientId]) -> Payload:
    return Payload()


@dataclass(frozen=True, kw_only=True)
class CohortRequest(Generic[Result]):
    """A request to the clients of a cohort.

    Args:
        kind: task.
        round: round, from 1; 0 before the first round.
        clients: ids of the clients.
        reader: reader of the results.
        shared: content that is equal for all nodes.
        content_for: function that returns the content for a node from the clients of this node.
        state_rounds: for each client, the round of the client state to start from. None: the request needs no client
            states.
        min_completed: number of results that close the round; None: wait for all results.
    """

    kind: RequestKind
    round: int
    clients: Sequence[ClientId]
    reader: ResponseReader[Result]
    shared: Payload = field(default_factory=Payload)
    content_for: Callable[[Sequence[ClientId]], Payload] = _no_content
    state_rounds: Mapping[ClientId, int] | None = None
    min_completed: int | None = None


def training_request(
    request: Request,
    strategy: Strategy,
    layout: Layout,
    *,
    members: Mapping[ClientId, Member],
    state_rounds: Mapping[ClientId, int],
    min_completed: int | None = None,
) -> CohortRequest[Updates | Failure]:
    """Return the request to train the clients of ``state_rounds``.

    Args:
        request: training order.
        strategy: strategy of the run.
        layout: layout of the model.
        members: member of each client.
        state_rounds: for each client, the round of the client state to start from; 0: the initial state.
        min_completed: number of updates that close the round; None: wait for all updates.
    """
    counts = {client: members[client].num_examples[client] for client in state_rounds if client in members}
    return CohortRequest(
        kind=RequestKind.FIT,
        round=request.round,
        clients=list(state_rounds),
        reader=UpdateReader.of(strategy, request, layout, counts),
        shared=pack_order(request),
        content_for=partial(pack_client_models, request),
        state_rounds=state_rounds,
        min_completed=min_completed,
    )


def evaluation_request(
    params_D: Array,
    clients: Sequence[ClientId],
    size: tuple[Task, int],
    *,
    round: int,
    state_rounds: Mapping[ClientId, int] | None,
) -> CohortRequest[ClientEvaluation]:
    """Return the request to evaluate a model, or the personal model of each client.

    Args:
        params_D: parameters of the model.
        clients: ids of the clients.
        size: task and number of classes, for the names and shapes of metrics.
        round: round, from 0.
        state_rounds: for each client, the round of the client state of its personal model; None: the model itself.
    """
    template = evaluation_template(*size)
    return CohortRequest(
        kind=RequestKind.EVALUATE,
        round=round,
        clients=clients,
        reader=EvaluationReader(template=template),
        shared=Payload(arrays={"params": params_D}),
        state_rounds=state_rounds,
    )


def evaluation_template(task: Task, num_classes: int) -> ClientEvaluation:
    """Return an evaluation of one example, for the names and shapes of the metrics of a task."""
    outputs, targets = task.example_arrays(num_classes)
    return evaluate_client(Predictions(client=0, outputs=outputs, targets=targets), task=task)
