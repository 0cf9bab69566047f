"""Respond to the requests of a coordinator with the node's data, if the node's policy accepts them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.records import (
    ClientEvaluation,
    ClientId,
    Failure,
    FailureStage,
    LocalSettings,
    Request,
    Updates,
)
from fedlearn.core.serialization import Payload, WireError, require_vector
from fedlearn.deploy.node_side.client_states import ClientStateError, ClientStates, check_run_name
from fedlearn.deploy.node_side.experiment import ExperimentBuilder, NodeConfig
from fedlearn.deploy.node_side.local_clients import LocalClients, with_reported_counts
from fedlearn.deploy.node_side.masking_keys import MASKING_KEY
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.deploy.node_side.privacy_budget import PrivacyBudget
from fedlearn.errors import FedlearnError
from fedlearn.loop.scenario import Scenario
from fedlearn.protocol.fields import client_of
from fedlearn.protocol.membership import Member
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.responses import pack_evaluations, pack_parameters
from fedlearn.protocol.training_order import read_order, require_order_fits
from fedlearn.protocol.updates import pack_updates

LOCK_TIMEOUT_S = 300.0  # seconds that a request waits for the end of an earlier one
log = logging.getLogger(__name__)


class NodeBusy(FedlearnError):
    """Report a node that still works on an earlier request."""


class NodeService:
    """Respond to requests, one after another.

    Args:
        config: the operator's settings of the node.
        policy: policy that each request must satisfy.
        client_states: stored client states.

    Guarantees:
        `respond` and `respond_to_bytes` never raise. A response has no example, label, prediction or traceback.
    """

    def __init__(self, config: NodeConfig, policy: Policy, client_states: ClientStates) -> None:
        self.config, self.policy, self.client_states = config, policy, client_states
        self.builder = ExperimentBuilder(config, policy)
        self._lock = Lock()
        self._handlers = {
            RequestKind.HELLO: self._hello,
            RequestKind.INIT: self._init,
            RequestKind.FIT: self._fit,
            RequestKind.MASK: self._mask,
            RequestKind.EVALUATE: self._evaluate,
        }

    def respond(self, request: NodeRequest) -> NodeResponse:
        """Return the response to a request. The reason of a refusal or failure is logged at the node too."""
        try:
            check_run_name(request.run)
            if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
                raise NodeBusy("this node is still busy with an earlier request, which has timed out")
            try:
                return self._handlers[request.kind](request)
            finally:
                self._lock.release()
        except PolicyViolation as error:
            log.warning("refused a request %s of run %s: %s", request.kind, request.run, error)
            return NodeResponse.refuse(request, FailureStage.POLICY, str(error))
        except (WireError, ClientStateError, NodeBusy) as error:
            log.warning("cannot respond to %s of run %s: %s", request.kind, request.run, error)
            return NodeResponse.refuse(request, FailureStage.REQUEST, str(error))
        except Exception as error:
            log.exception("a request %s of run %s failed", request.kind, request.run)
            reason = str(error) if isinstance(error, FedlearnError) else f"{type(error).__name__}: {error}"
            stage = FailureStage.FIT if request.kind == RequestKind.FIT else FailureStage.NODE
            return NodeResponse.refuse(request, stage, reason)

    def respond_to_bytes(self, data: bytes) -> bytes:
        """Return the packed response to a packed request, which may be unreadable."""
        try:
            request = NodeRequest.unpack(data)
        except WireError as error:
            log.warning("cannot read a request: %s", error)
            return NodeResponse.refuse(None, FailureStage.REQUEST, str(error)).pack()
        response = self.respond(request)
        try:
            return response.pack()
        except Exception as error:  # e.g. a scenario whose number of classes is NaN
            log.exception("the response to %s of run %s cannot be packed", request.kind, request.run)
            return NodeResponse.refuse(request, FailureStage.NODE, f"{type(error).__name__}: {error}").pack()

    def _hello(self, request: NodeRequest) -> NodeResponse:
        scenario, keys = self.builder.scenario(request.settings), self.config.masking_keys
        clients, data, trainer = self._local(scenario, self.config.clients), scenario.data, scenario.trainer
        reported = self.policy.reveal.reported_count
        member = Member(
            layout=trainer.layout,
            num_examples={client: reported(len(data.train(client))) for client in clients},
            names={client: data.name(client) for client in clients},
            name=scenario.name,
            task=data.task,
            num_classes=data.num_classes,
            model=scenario.model,
            partition=scenario.partition,
            framework=trainer.framework,
            device=trainer.device,
            supports_metrics=self.policy.reveal.metrics,
            masking_key=keys.public_key.hex() if keys else "",
        )
        return NodeResponse.to(request, clients=clients, content=member.pack())

    def _init(self, request: NodeRequest) -> NodeResponse:
        scenario = self.builder.scenario(request.settings)
        _require_layout(request, scenario)
        seed = request.content.metadata.get("seed")
        if type(seed) is not int or seed < 0:
            raise WireError("the request for initial parameters has no seed >= 0")
        return NodeResponse.to(request, content=pack_parameters(scenario.trainer.init(seed)))

    def _fit(self, request: NodeRequest) -> NodeResponse:
        scenario = self.builder.scenario(request.settings)
        clients = self._local(scenario, request.clients)
        strategy, order = self._accept_order(request, scenario, clients)
        if any(stage.needs_sum for stage in strategy.stages):
            raise PolicyViolation("the updates of this strategy can leave through secure aggregation only")
        rounds = request.states_by_client()
        local = self._clients_of(request, scenario)
        results = [local.train(strategy, order, client, rounds[client]) for client in clients]
        updates = [
            with_reported_counts(result, self.policy.reveal) for result in results if isinstance(result, Updates)
        ]
        return _results(request, results, pack_updates(updates))

    def _mask(self, request: NodeRequest) -> NodeResponse:
        """Respond to messages of secure aggregation; a training order makes the clients train and mask updates."""
        from fedlearn.deploy.node_side.masked_clients import MaskedClients  # needs the extra privacy

        keys = self.config.masking_keys
        if keys is None:
            raise PolicyViolation(f"this node has no {MASKING_KEY} for secure aggregation; try --keys at the node")
        scenario = self.builder.scenario(request.settings)
        clients = self._local(scenario, request.clients)
        strategy, _ = self.builder.strategy(request.settings, scenario, LocalSettings())
        masked = MaskedClients.of(
            request.content, clients, strategy, run=request.run, masking_keys=keys, client_states=self.client_states
        )
        train = None
        if request.shared.arrays:
            strategy, order = self._accept_order(request, scenario, clients)
            rounds, local = request.states_by_client(), self._clients_of(request, scenario)
            train = lambda client: local.train(strategy, order, client, rounds[client])  # noqa: E731
        results, content = masked.respond(train, min_clients=self.policy.required_privacy.min_clients_in_sum)
        return _results(request, results, content)

    def _evaluate(self, request: NodeRequest) -> NodeResponse:
        scenario = self.builder.scenario(request.settings)
        clients, reveal = self._local(scenario, request.clients), self.policy.reveal
        _require_layout(request, scenario)
        params_D = request.shared.arrays.get("params", np.zeros(0))
        require_vector(params_D, (scenario.trainer.layout.num_parameters,), "params")
        chosen = [
            client
            for client in clients
            if reveal.metrics and len(scenario.data.test(client)) >= reveal.min_test_examples
        ]
        for client in sorted(set(clients) - set(chosen)):
            log.info("client %d is not evaluated, because of the policy of this node", client)
        local = self._clients_of(request, scenario)
        if request.state_rounds is None:
            results = local.evaluate(params_D, chosen)
        else:
            rounds = request.states_by_client()
            strategy, _ = self.builder.strategy(request.settings, scenario, LocalSettings())
            results = [local.evaluate_personal(strategy, params_D, client, rounds[client]) for client in chosen]
        evaluations = [result for result in results if isinstance(result, ClientEvaluation)]
        return _results(request, results, pack_evaluations(evaluations))

    def _accept_order(
        self, request: NodeRequest, scenario: Scenario, clients: Sequence[ClientId]
    ) -> tuple[Strategy, Request]:
        """Return the strategy and the training order of a request after all checks.

        The node then has counted the request and charged its privacy loss, also if the training fails later.

        Raises:
            PolicyViolation: The policy does not accept the request.
            WireError: The order is malformed, or does not fit the model.
        """
        _require_layout(request, scenario)
        order = read_order(request.shared, request.round)
        require_order_fits(order, scenario.trainer.layout)
        request.states_by_client()
        strategy, local = self.builder.strategy(request.settings, scenario, order.local)
        # a coordinator could clear `deployed`, and predict the noise from the seed of the request
        order = replace(order, local=local, deployed=True)
        of_run, total = self.client_states.request_counts(request.run)
        self.policy.check_request(order, request.settings, num_requests_of_run=of_run, num_requests_total=total)
        self._charge(scenario, strategy, order, clients)
        self.client_states.count_request(request.run)
        return strategy, order

    def _charge(self, scenario: Scenario, strategy: Strategy, order: Request, clients: Sequence[ClientId]) -> None:
        """Charge the node's own ledger if the policy has a limit; refuse a request that would exceed it."""
        limit, guarantee = self.policy.required_privacy, strategy.privacy_guarantee
        if limit.max_epsilon is None or guarantee is None:
            return
        sizes = np.array([len(scenario.data.train(client)) for client in clients])
        release = Release(
            round=order.round,
            clients=tuple(clients),
            num_examples=tuple(sizes.tolist()),
            num_steps=tuple(order.local.num_steps(sizes).tolist()),
        )
        budget = PrivacyBudget(self.client_states.folder)
        reason = budget.refusal_reason(guarantee, release, epsilon=limit.max_epsilon, delta=limit.delta)
        if reason:
            raise PolicyViolation(reason)
        budget.charge(guarantee, release)

    def _clients_of(self, request: NodeRequest, scenario: Scenario) -> LocalClients:
        return LocalClients(scenario=scenario, client_states=self.client_states, run=request.run)

    def _local(self, scenario: Scenario, clients: Sequence[ClientId]) -> tuple[ClientId, ...]:
        """Return the clients in ascending order.

        Raises:
            WireError: A client is not at this node, or not in the scenario.
        """
        missing = [client for client in clients if client not in self.config.clients]
        if missing:
            raise WireError(f"clients {missing} are not at this node, which has {list(self.config.clients)}")
        unknown = [client for client in clients if client not in scenario.data.clients]
        if unknown:
            raise WireError(f"scenario {scenario.name} has no clients {unknown}: it has {len(scenario.data.clients)}")
        return tuple(sorted(clients))


def _require_layout(request: NodeRequest, scenario: Scenario) -> None:
    if request.layout != scenario.trainer.layout.digest:
        raise WireError("the request is for a model with another layout (names, shapes or dtypes of parameters)")


def _results(request: NodeRequest, results: Sequence[Any], content: Payload) -> NodeResponse:
    """Return the response with all results; ``content`` has one row per client without a failure."""
    failures = tuple(result for result in results if isinstance(result, Failure))
    clients = tuple(client_of(result) for result in results if not isinstance(result, Failure))
    return NodeResponse.to(request, clients=clients, failures=failures, content=content)
