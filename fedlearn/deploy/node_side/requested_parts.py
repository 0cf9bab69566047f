"""Build scenario, strategy and training order of a request, or refuse the request.

The functions receive single fields of a request, so they need no message.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlearn.algorithm.strategy import CompositionError, Strategy
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, LocalSettings, Request
from fedlearn.core.serialization import Payload
from fedlearn.core.tasks import Task
from fedlearn.deploy.node_side.experiment import ExperimentBuilder, NodeConfig
from fedlearn.deploy.node_side.noisy_evaluation import has_bounded_sums
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_violation import NodeRefusal, PolicyViolation, RequestError
from fedlearn.deploy.node_side.query_log import QueryLog
from fedlearn.deploy.node_side.reveal import NOISED
from fedlearn.loop.scenario import Scenario
from fedlearn.protocol.refusals import RefusalCode
from fedlearn.protocol.training_order import read_client_models, read_order, require_order_fits

log = logging.getLogger(__name__)


def build_scenario(
    builder: ExperimentBuilder, policy: Policy, queries: QueryLog, settings: Mapping[str, Any], run: str
) -> Scenario:
    """Return the scenario of a request, which counts as an answer of this node.

    Raises:
        NodeRefusal: The policy does not accept the settings, or the scenario cannot be built with the data.
    """
    policy.check_settings(settings)
    queries.admit_scenario(settings["scenario"], limit=policy.max_scenarios)
    try:
        return builder.scenario(settings)
    except NodeRefusal:
        raise
    except Exception as error:
        log.exception("the scenario of run %s cannot be built", run)
        raise NodeRefusal(RefusalCode.SCENARIO, f"{type(error).__name__}: {error}") from error


def build_strategy(
    builder: ExperimentBuilder, settings: Mapping[str, Any], scenario: Scenario, local: LocalSettings, run: str
) -> tuple[Strategy, LocalSettings]:
    """Return the strategy and the local settings of a request.

    Raises:
        NodeRefusal: The privacy mechanism refuses the strategy, or the settings do not build a strategy.
    """
    try:
        return builder.strategy(settings, scenario, local)
    except NodeRefusal:
        raise
    except CompositionError as error:  # it follows from the settings of the request
        raise PolicyViolation(str(error)) from error
    except Exception as error:
        log.exception("the strategy of run %s cannot be built", run)
        raise NodeRefusal(RefusalCode.STRATEGY, f"{type(error).__name__}: {error}") from error


def accepted_order(
    order: Request, strategy: Strategy, local: LocalSettings, policy: Policy, settings: Mapping[str, Any]
) -> Request:
    """Return a training order with the local settings of the node, after all checks that need no counts.

    Raises:
        NodeRefusal: The policy does not accept the order, or the order does not fit the strategy.
    """
    if bool(order.client_models) != (strategy.aggregate.client_models is not None):
        raise RequestError("the request has a model for each client, or one for all; the strategy has the other")
    # a coordinator could clear `deployed`, and predict the noise from the seed of the request
    order = replace(order, local=local, deployed=True)
    policy.check_request(order, settings, num_requests_of_run=0, num_requests_total=0)
    return order


def read_training_order(
    shared: Payload, models: Payload | None, round: int, clients: Sequence[ClientId], layout: Layout
) -> Request:
    """Return the training order of a request, with the model of each client if the request has them.

    Args:
        shared: shared content of the request.
        models: content for the node with the models of its clients; None if the request cannot have them.
        round: round of the request.
        clients: clients of the request.
        layout: layout of the model.

    Raises:
        WireError: A field or an array is missing, unknown or out of range, or does not fit the layout.
    """
    has_models = models is not None and (models.arrays or models.metadata)
    order = read_order(shared, round, read_client_models(models, clients, layout) if models and has_models else {})
    require_order_fits(order, layout)
    return order


def require_layout(digest: str, scenario: Scenario) -> None:
    """Refuse a request for a model with another layout.

    Raises:
        RequestError: The digest of the layout differs.
    """
    if digest != scenario.trainer.layout.digest:
        raise RequestError("the request is for a model with another layout (names, shapes or dtypes of parameters)")


def require_local(config: NodeConfig, scenario: Scenario, clients: Sequence[ClientId]) -> tuple[ClientId, ...]:
    """Return the clients in ascending order.

    Raises:
        NodeRefusal: A client is not at this node, or not in the scenario.
    """
    missing = [client for client in clients if client not in config.clients]
    if missing:
        raise RequestError(f"clients {missing} are not at this node, which has {list(config.clients)}")
    unknown = [client for client in clients if client not in scenario.data.clients]
    if unknown:
        detail = f"scenario {scenario.name} has no clients {unknown}: it has {len(scenario.data.clients)}"
        raise NodeRefusal(RefusalCode.SCENARIO, detail)
    return tuple(sorted(clients))


def metrics_to_send(policy: Policy, task: Task) -> bool | str:
    """Return the metrics that may leave; False if their sums have no bound, which noise needs."""
    return False if policy.metrics == NOISED and not has_bounded_sums(task) else policy.metrics
