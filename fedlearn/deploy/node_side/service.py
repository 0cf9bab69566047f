"""Respond to the requests of a coordinator with the node's data, if the node's policy accepts them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from threading import Lock
from typing import Any

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.layout import Layout
from fedlearn.core.records import (
    ClientEvaluation,
    ClientId,
    Failure,
    LocalSettings,
    Request,
    Updates,
)
from fedlearn.core.serialization import Payload, WireError, require_vector
from fedlearn.core.tensor_bytes import Buffer
from fedlearn.deploy.node_side.client_states import ClientStateError, ClientStates, check_run_name
from fedlearn.deploy.node_side.disk_limits import has_room
from fedlearn.deploy.node_side.experiment import ExperimentBuilder, NodeConfig
from fedlearn.deploy.node_side.gate import AllowedContent, allowed_content, check_response
from fedlearn.deploy.node_side.local_clients import LocalClients, with_reported_counts
from fedlearn.deploy.node_side.masking_keys import MASKING_KEY
from fedlearn.deploy.node_side.node_audit import ORDER_FIELDS, NodeAudit
from fedlearn.deploy.node_side.pending_charges import PendingCharges
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_file import PolicyFile
from fedlearn.deploy.node_side.policy_violation import NodeRefusal, PolicyViolation, RequestError
from fedlearn.deploy.node_side.privacy_budget import PrivacyBudget
from fedlearn.deploy.node_side.query_log import QueryLog, digest_of, digest_of_params
from fedlearn.deploy.node_side.refusal_log import log_failures, log_refusal, reading_request
from fedlearn.deploy.node_side.requested_parts import (
    accepted_order,
    build_scenario,
    build_strategy,
    metrics_to_send,
    read_training_order,
    require_layout,
    require_local,
)
from fedlearn.deploy.node_side.reveal import NOISED
from fedlearn.deploy.node_side.stored_responses import StoredResponses
from fedlearn.deploy.node_side.training_admission import TrainingAdmission
from fedlearn.errors import FedlearnError
from fedlearn.loop.scenario import Scenario
from fedlearn.protocol.fields import client_of
from fedlearn.protocol.membership import Member
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.refusals import Refusal, RefusalCode
from fedlearn.protocol.responses import pack_evaluations, pack_parameters
from fedlearn.protocol.updates import pack_updates

MAX_KNOWN_RUNS = 100  # runs whose next request does not look for changed data
LOCK_TIMEOUT_S = 300.0  # seconds that a request waits for the end of an earlier one
log = logging.getLogger(__name__)


class NodeService:
    """Respond to requests, one after another.

    Args:
        config: the operator's settings of the node.
        policy: policy that each request must satisfy, or its file, which is read again after a change.
        client_states: stored client states.

    Guarantees:
        `respond` and `respond_to_bytes` never raise. Each response passes `fedlearn.deploy.node_side.gate`, and is in
        the audit log on disk before it leaves. A refusal has a code and a reference. Its details stay in the log of the
        node, unless they cannot depend on data. No number of requests fills the disk: some space always stays free.
    """

    def __init__(self, config: NodeConfig, policy: Policy | PolicyFile, client_states: ClientStates) -> None:
        self._policy_file = policy if isinstance(policy, PolicyFile) else None
        self.policy = policy.current() if isinstance(policy, PolicyFile) else policy
        self.config, self.client_states = config, client_states
        self.builder = ExperimentBuilder(config, self.policy)
        self.pending = PendingCharges(client_states.folder)
        self.queries = QueryLog(client_states.folder)
        self.budget = PrivacyBudget(client_states.folder, self.policy.required_privacy)
        self.stored = StoredResponses(client_states.folder)
        self.audit = NodeAudit(client_states.folder)
        self._last_digest: tuple[NodeRequest | None, str] = (None, "")
        self._runs: list[str] = []  # last runs since the start
        self._lock = Lock()
        self._handlers = {
            RequestKind.HELLO: self._hello,
            RequestKind.INIT: self._init,
            RequestKind.FIT: self._fit,
            RequestKind.MASK: self._mask,
            RequestKind.EVALUATE: self._evaluate,
        }

    def respond(self, request: NodeRequest) -> NodeResponse:
        """Return the response to a request. The details of a refusal or failure are in the log of the node."""
        (response, policy, data), epsilon = self._respond(request), None
        try:
            epsilon = self.budget.epsilon()
        except ClientStateError as error:  # without a ledger, only a refusal leaves
            response = NodeResponse.refuse(request, _refusal(RefusalCode.CLIENT_STATE, str(error), request))
        try:
            self.audit.record(
                {name: getattr(request, name) for name in ORDER_FIELDS},
                response.content,
                num_results=len(response.clients),
                failures=response.failures,
                refusal=response.refusal,
                policy=policy,
                epsilon=epsilon,
                data=data,
            )
        except Exception:  # nothing leaves without a line in the audit log
            log.exception("the audit log cannot be written")
            return NodeResponse.refuse(request, _refusal(RefusalCode.INTERNAL, "see the traceback above", request))
        return response

    def _respond(self, request: NodeRequest) -> tuple[NodeResponse, Policy, str]:
        """Return the response, the policy that was in force, and the digest of the data in use."""
        policy, data = self.policy, ""
        try:
            if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
                raise NodeRefusal(RefusalCode.BUSY)
            try:
                if not has_room(self.client_states.folder):
                    raise NodeRefusal(RefusalCode.DISK, f"the disk of {self.client_states.folder} is almost full")
                self._use_current_policy()
                policy = self.policy
                _check_run_name(request.run)
                self._forget_removed_data(request)
                response = self._handlers[request.kind](request)
                self._check(request, response)
                return _log_failures(response), policy, self.builder.data_digest()
            finally:
                self._last_digest = (None, "")  # a request may be large
                data = self.builder.data_digest()
                self._lock.release()
        except NodeRefusal as error:
            refusal = _refusal(error.code, str(error), request)
        except ClientStateError as error:
            refusal = _refusal(RefusalCode.CLIENT_STATE, str(error), request)
        except Exception:
            log.exception("a request %s of run %s failed", request.kind, request.run)
            refusal = _refusal(RefusalCode.INTERNAL, "see the traceback above", request)
        return NodeResponse.refuse(request, refusal), policy, data

    def _use_current_policy(self) -> None:
        """Read the policy again if its file has changed.

        Raises:
            PolicyViolation: The file is not a policy at this moment.
        """
        if self._policy_file is not None and (policy := self._policy_file.current()) is not self.policy:
            self.policy = self.builder.policy = policy
            self.budget = PrivacyBudget(self.client_states.folder, policy.required_privacy)

    def respond_to_bytes(self, data: Buffer) -> bytes:
        """Return the packed response to a packed request, which may be unreadable."""
        return b"".join(self.respond_in_parts(data))

    def respond_in_parts(self, data: Buffer) -> list[Buffer]:
        """Return the packed response to a packed request in parts, without copies of its arrays.

        Args:
            data: packed request, which may be unreadable.
        """
        try:
            request = NodeRequest.unpack(data)
        except WireError as error:
            refusal = _refusal(RefusalCode.REQUEST, str(error))
            with suppress(OSError):
                self.audit.record_unreadable(refusal.reference)
            return NodeResponse.refuse(None, refusal).pack_parts()
        response = self.respond(request)
        try:
            return response.pack_parts()
        except Exception:  # e.g. a scenario whose number of classes is NaN
            log.exception("the response to %s of run %s cannot be packed", request.kind, request.run)
            refusal = _refusal(RefusalCode.INTERNAL, "see the traceback above", request)
            return NodeResponse.refuse(request, refusal).pack_parts()

    def _forget_removed_data(self, request: NodeRequest) -> None:
        """Look for changed data before a hello request, and before the first request of each run.

        A hostile coordinator sends no hello requests, and would train on data that the operator has removed.
        """
        if request.kind == RequestKind.HELLO or request.run not in self._runs:
            self.builder.forget_changed_data()
        self._runs = [*self._runs[-MAX_KNOWN_RUNS + 1 :], request.run] if request.run not in self._runs else self._runs

    def _hello(self, request: NodeRequest) -> NodeResponse:
        scenario, keys = self._scenario(request), self.config.masking_keys
        clients, data, trainer = (
            require_local(self.config, scenario, self.config.clients),
            scenario.data,
            scenario.trainer,
        )
        reported = self.policy.reveal.reported_count
        member = Member(
            layout=trainer.layout,
            num_examples={client: reported(len(data.train(client))) for client in clients},
            names={client: data.name(client) for client in clients},
            name=scenario.name,
            task=data.task.name,
            num_classes=data.num_classes,
            model=scenario.model,
            partition=scenario.partition,
            framework=trainer.framework,
            device=trainer.device,
            supports_metrics=metrics_to_send(self.policy, scenario.data.task) is not False,
            masking_key=keys.public_key.hex() if keys else "",
            base_digest=scenario.base_digest,
        )
        return NodeResponse.to(request, clients=clients, content=member.pack())

    def _init(self, request: NodeRequest) -> NodeResponse:
        scenario = self._scenario(request)
        require_layout(request.layout, scenario)
        seed = request.content.metadata.get("seed")
        if type(seed) is not int or seed < 0:
            raise RequestError("the request for initial parameters has no seed >= 0")
        return NodeResponse.to(request, content=pack_parameters(scenario.trainer.init(seed)))

    def _fit(self, request: NodeRequest) -> NodeResponse:
        scenario = self._scenario(request)
        clients = require_local(self.config, scenario, request.clients)
        strategy, order = self._check_order(request, scenario)
        if any(stage.needs_sum for stage in strategy.stages):
            raise PolicyViolation("the updates of this strategy can leave through secure aggregation only")
        if stored := self._stored(request):
            return stored
        train = self._admit_training(request, scenario, strategy, order, clients)
        with self.pending.charged(request.run, _kind(request), self._digest(request)):
            results = [train(client) for client in clients]
            updates = [
                with_reported_counts(result, self.policy.reveal) for result in results if isinstance(result, Updates)
            ]
            return self._store(request, results, pack_updates(updates))

    def _mask(self, request: NodeRequest) -> NodeResponse:
        """Respond to messages of secure aggregation; a training order makes the clients train and mask updates."""
        from fedlearn.deploy.node_side.masked_clients import MaskedClients  # needs the extra privacy

        keys = self.config.masking_keys
        if keys is None:
            raise NodeRefusal(RefusalCode.NO_MASKING_KEY, f"this node has no {MASKING_KEY}; try --keys at the node")
        scenario = self._scenario(request)
        clients = require_local(self.config, scenario, request.clients)
        strategy, _ = self._strategy(request, scenario, LocalSettings())
        with reading_request(RefusalCode.MASKING_KEYS):
            masked = MaskedClients.of(
                request.content,
                clients,
                strategy,
                run=request.run,
                masking_keys=keys,
                node_clients=self.config.clients,
                required_privacy=self.policy.required_privacy,
                client_states=self.client_states,
            )
        self.policy.required_privacy.check_threshold(masked.threshold)
        trains = bool(request.shared.arrays)
        if trains:
            strategy, order = self._check_order(request, scenario)
        if stored := self._stored(request):
            return stored
        if not trains:
            return self._store(request, *masked.respond(None))
        train = self._admit_training(request, scenario, strategy, order, clients)
        with self.pending.charged(request.run, _kind(request), self._digest(request)):
            return self._store(request, *masked.respond(train))

    def _evaluate(self, request: NodeRequest) -> NodeResponse:
        scenario = self._scenario(request)
        clients, metrics = (
            require_local(self.config, scenario, request.clients),
            metrics_to_send(self.policy, scenario.data.task),
        )
        require_layout(request.layout, scenario)
        params_D, is_personal = request.shared.arrays.get("params", np.zeros(0)), request.state_rounds is not None
        with reading_request():
            require_vector(params_D, (scenario.trainer.layout.num_parameters,), "params")
        if metrics is False or (metrics == NOISED and is_personal):  # personal models depend on data without noise
            raise NodeRefusal(RefusalCode.EVALUATION_WITHHELD, f"reveal.metrics is {self.policy.metrics}")
        strategy, _ = self._strategy(request, scenario, LocalSettings())
        self.queries.admit_evaluation(
            request.run,
            request.round,
            scenario=digest_of(request.settings["scenario"]),
            params=digest_of_params(params_D),
            kind=_kind(request),
            request=self._digest(request),
            limits=self.policy.evaluation_limits,
        )
        if stored := self._stored(request):
            return stored
        local = self._clients_of(request, scenario)
        results: Sequence[ClientEvaluation | Failure]
        if metrics == NOISED:
            return self._evaluate_noisy(request, local, params_D, clients)
        clients = local.with_enough_examples(clients, self.policy.reveal.min_test_examples)
        results = (
            [local.evaluate_personal(strategy, params_D, c, request.states_by_client()[c]) for c in clients]
            if is_personal
            else local.evaluate(params_D, clients)
        )
        evaluations = [result for result in results if isinstance(result, ClientEvaluation)]
        return self._store(request, results, pack_evaluations(evaluations))

    def _evaluate_noisy(
        self, request: NodeRequest, local: LocalClients, params_D: np.ndarray, clients: Sequence[ClientId]
    ) -> NodeResponse:
        """Charge an evaluation on disk, and evaluate with noise."""
        epsilon, digest = self.policy.reveal.metrics_epsilon, self._digest(request)
        if not self.pending.includes(request.run, _kind(request), digest):
            self.budget.charge_evaluation(clients, epsilon)
        with self.pending.charged(request.run, _kind(request), digest):
            evaluations = local.evaluate_noisy(params_D, clients, epsilon)
            return self._store(request, evaluations, pack_evaluations(evaluations))

    def _scenario(self, request: NodeRequest) -> Scenario:
        return build_scenario(self.builder, self.policy, self.queries, request.settings, request.run)

    def _strategy(
        self, request: NodeRequest, scenario: Scenario, local: LocalSettings
    ) -> tuple[Strategy, LocalSettings]:
        return build_strategy(self.builder, request.settings, scenario, local, request.run)

    def _check_order(self, request: NodeRequest, scenario: Scenario) -> tuple[Strategy, Request]:
        """Return the strategy and the training order of a request after all checks that need no counts.

        Raises:
            NodeRefusal: The policy does not accept the request, or the order is malformed or does not fit the model.
        """
        require_layout(request.layout, scenario)
        with reading_request():
            order = _read_order(request, scenario.trainer.layout)
            request.states_by_client()
        strategy, local = self._strategy(request, scenario, order.local)
        return strategy, accepted_order(order, strategy, local, self.policy, request.settings)

    def _admit_training(
        self,
        request: NodeRequest,
        scenario: Scenario,
        strategy: Strategy,
        order: Request,
        clients: Sequence[ClientId],
    ) -> Callable[[ClientId], Updates | Failure]:
        """Charge and count a training request on disk, and return the function that trains a client.

        Raises:
            NodeRefusal: See `TrainingAdmission.admit`. The returned function raises it if a client took more steps than
                the request was charged for.
        """
        admission = TrainingAdmission(
            policy=self.policy,
            client_states=self.client_states,
            queries=self.queries,
            budget=self.budget,
            pending=self.pending,
        )
        charged = admission.admit(
            request.run,
            request.settings,
            order,
            strategy,
            scenario,
            clients=clients,
            kind=_kind(request),
            digest=self._digest(request),
        )
        rounds, local = request.states_by_client(), self._clients_of(request, scenario)

        def train(client: ClientId) -> Updates | Failure:
            result = local.train(strategy, order.for_client(client), client, rounds[client])
            if order.local.example_dp and isinstance(result, Updates) and result.num_steps_K[0] > charged[client]:
                detail = f"client {client} took {result.num_steps_K[0]} steps, charged {charged[client]}"
                raise NodeRefusal(RefusalCode.WITHHELD, detail)
            return result

        return train

    def _store(self, request: NodeRequest, results: Sequence[Any], content: Payload) -> NodeResponse:
        """Return the response with all results, after it is stored for a repeated request.

        The content has one row per client without a failure.
        """
        failures = tuple(result for result in results if isinstance(result, Failure))
        clients = tuple(client_of(result) for result in results if not isinstance(result, Failure))
        response = NodeResponse.to(request, clients=clients, failures=failures, content=content)
        if response.clients:  # without a result, a repeated request may succeed
            data = replace(response, id="").pack_parts()
            self.stored.save(request.run, _kind(request), self._digest(request), data)
        return response

    def _stored(self, request: NodeRequest) -> NodeResponse | None:
        """Return the stored response to an equal request; None if there is none."""
        data = self.stored.load(request.run, _kind(request), self._digest(request))
        if data is None:
            return None
        response = NodeResponse.unpack(data, replace(request, id=""), max_bytes=len(data))
        return replace(response, id=request.id)

    def _digest(self, request: NodeRequest) -> str:
        """Return a digest of all fields of a request but its id.

        It includes the parts of the policy that determine a response. So after a change of the policy, no stored
        response leaves.
        """
        last, digest = self._last_digest
        if last is not request:
            policy = digest_of({"reveal": asdict(self.policy.reveal), "privacy": asdict(self.policy.required_privacy)})
            hashed = hashlib.sha256(policy.encode())
            for part in replace(request, id="").pack_parts():
                hashed.update(part)
            digest = hashed.hexdigest()
            self._last_digest = (request, digest)
        return digest

    def _check(self, request: NodeRequest, response: NodeResponse) -> None:
        """Refuse a response with values that may not leave."""
        check_response(
            request.kind,
            response.content,
            self._allowed(request),
            policy=self.policy,
            clients={*response.clients, *(failure.client for failure in response.failures)},
            requested=request.clients,
        )

    def _allowed(self, request: NodeRequest) -> AllowedContent:
        scenario = self.builder.scenario(request.settings)
        strategy = None
        if request.kind == RequestKind.FIT:  # with ``optimizer_state=average`` clients send more values
            local = _read_order(request, scenario.trainer.layout).local
            strategy, _ = self._strategy(request, scenario, local)
        return allowed_content(
            request.kind,
            self.policy,
            strategy=strategy,
            task=scenario.data.task,
            num_classes=scenario.data.num_classes,
            clients=request.clients,
        )

    def _clients_of(self, request: NodeRequest, scenario: Scenario) -> LocalClients:
        return LocalClients(scenario=scenario, client_states=self.client_states, run=request.run)


def _read_order(request: NodeRequest, layout: Layout) -> Request:
    models = request.content if request.kind == RequestKind.FIT else None
    return read_training_order(request.shared, models, request.round, request.clients, layout)


def _kind(request: NodeRequest) -> str:
    """Return the kind of a request, with ``personal_`` for the evaluation of personal models."""
    is_personal = request.kind == RequestKind.EVALUATE and request.state_rounds is not None
    return f"personal_{request.kind}" if is_personal else str(request.kind)


def _check_run_name(run: str) -> None:
    try:
        check_run_name(run)
    except FedlearnError as error:
        raise RequestError(str(error)) from error


def _refusal(code: RefusalCode, detail: str, request: NodeRequest | None = None) -> Refusal:
    if request is None:
        return log_refusal(code, detail)
    return log_refusal(code, detail, kind=request.kind, run=request.run)


def _log_failures(response: NodeResponse) -> NodeResponse:
    """Log the failures of a response under a new reference, and return the response with this reference."""
    return replace(response, reference=log_failures(response.failures))
