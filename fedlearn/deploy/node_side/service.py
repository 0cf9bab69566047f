"""One operator's site: what it answers to a coordinator's requests, under its own policy and with its own data.

The same code trains here as in a simulation: the serial engine, for the clients that live here.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from hydra.utils import get_object

from fedlearn.algorithm.strategy import Strategy, with_buffer_policy, with_compression
from fedlearn.algorithm.transforms import Stage
from fedlearn.core.arrays import as_numpy
from fedlearn.core.metrics import evaluate_client
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.records import (
    ClientEvaluation,
    ClientId,
    Failure,
    FailureStage,
    LocalSettings,
    MetricSum,
    Predictions,
    Request,
    Updates,
)
from fedlearn.core.serialization import Payload, WireError, read_fields, unpack
from fedlearn.deploy.node_side.client_states import ClientStateError, ClientStates, check_run_name
from fedlearn.deploy.node_side.masking_keys import MASKING_KEY, MaskingKeys
from fedlearn.deploy.node_side.policy import Policy, PolicyViolation
from fedlearn.deploy.node_side.privacy_budget import PrivacyBudget
from fedlearn.engines.base import failure, serial
from fedlearn.errors import FedlearnError
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.mechanisms.base import Mechanism, Population
from fedlearn.protocol.requests import RequestHeader, layout_to_json, read_params, read_request, read_state_rounds
from fedlearn.protocol.responses import pack_evaluation_response, pack_fit_response, pack_refusal, pack_response
from fedlearn.protocol.secagg_messages import pack_mask_response, read_mask_request
from fedlearn.runner.config import build

MAX_CACHED = 8  # scenarios and strategies that stay built
LOCK_TIMEOUT_S = 300.0  # seconds that a request waits for an earlier one to end
log = logging.getLogger(__name__)


class NodeBusy(FedlearnError):
    """An earlier request is not done yet."""


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """What the operator says about the site, whatever an order says.

    Args:
        clients: ids of the clients that live here.
        data: where the scenario's builder finds the data; None lets it search.
        framework: ``torch`` or ``jax``; None takes the order's.
        device: where to compute.
        masking_keys: keys for secure aggregation; None takes part in none.
    """

    clients: tuple[ClientId, ...]
    data: Path | None = None
    framework: str | None = None
    device: str = "cpu"
    masking_keys: MaskingKeys | None = None


class NodeService:
    """Answers requests, one after another.

    Args:
        config: clients, data, framework.
        policy: what is accepted.
        client_states: what its clients keep.

    *Guarantees*: `handle_request` never raises; a reply holds no example, no label, no prediction and no traceback.
    """

    def __init__(self, config: NodeConfig, policy: Policy, client_states: ClientStates) -> None:
        self.config, self.policy, self.client_states = config, policy, client_states
        self._lock = Lock()
        self._built: dict[str, Any] = {}

    def handle_request(self, message: bytes) -> bytes:
        """The reply to a request; a reason where it is refused or fails, which is logged here too."""
        facts: Mapping[str, Any] = {}
        stage = "request"
        try:
            parcel = unpack(message)
            facts, ask = parcel.metadata, RequestHeader.from_metadata(parcel.metadata)
            stage = ask.kind
            check_run_name(ask.run)
            if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
                raise NodeBusy("this node is still busy with an earlier request, for which nobody waits any more")
            try:
                return getattr(self, f"_{ask.kind}")(ask, parcel)
            finally:
                self._lock.release()
        except PolicyViolation as error:
            log.warning("refused a %s of run %s: %s", stage, facts.get("run"), error)
            return pack_refusal(facts, FailureStage.POLICY, str(error))
        except (WireError, ClientStateError, NodeBusy) as error:
            log.warning("cannot answer a %s of run %s: %s", stage, facts.get("run"), error)
            return pack_refusal(facts, FailureStage.REQUEST, str(error))
        except Exception as error:
            log.exception("a %s of run %s failed", stage, facts.get("run"))
            reason = str(error) if isinstance(error, FedlearnError) else f"{type(error).__name__}: {error}"
            return pack_refusal(facts, stage, reason)

    def _hello(self, ask: RequestHeader, parcel: Payload) -> bytes:
        scenario = self._scenario(ask)
        here = self._here(scenario, self.config.clients)
        data, trainer = scenario.data, scenario.trainer
        return pack_response(
            ask,
            clients=list(here),
            leaves=layout_to_json(trainer.layout),
            name=scenario.name,
            task=data.task,
            num_classes=data.num_classes,
            names={str(client): data.name(client) for client in here},
            num_examples=[self.policy.reveal.reported_count(len(data.train(client))) for client in here],
            model=scenario.model,
            partition=scenario.partition,
            framework=trainer.framework,
            device=trainer.device,
            supports_metrics=self.policy.reveal.metrics,
            masking_key=self.config.masking_keys.public_key.hex() if self.config.masking_keys else "",
        )

    def _init(self, ask: RequestHeader, parcel: Payload) -> bytes:
        scenario = self._scenario(ask)
        seed = parcel.metadata.get("seed")
        if type(seed) is not int or ask.layout != scenario.trainer.layout.digest:
            raise WireError("the request for initial parameters has no seed, or speaks of another layout")
        return pack_response(ask, {"params": scenario.trainer.init(seed)})

    def _fit(self, ask: RequestHeader, parcel: Payload) -> bytes:
        scenario = self._scenario(ask)
        clients = self._here(scenario, ask.clients)
        strategy, order, since = self._admitted(ask, parcel, scenario, clients)
        if any(stage.needs_sum for stage in strategy.stages):
            raise PolicyViolation("this strategy's updates leave through secure aggregation only")
        results = [self._train(scenario, strategy, order, client, ask.run, since[client]) for client in clients]
        return pack_fit_response(ask, [self._told(result) for result in results])

    def _admitted(
        self, ask: RequestHeader, parcel: Payload, scenario: Scenario, clients: Sequence[ClientId]
    ) -> tuple[Strategy, Request, dict[ClientId, int]]:
        """An order to train that the policy accepts; from here on it counts, and is paid for."""
        order, since = read_request(parcel, scenario.trainer.layout)
        strategy, local = self._protected(ask, order.local, scenario)
        # whatever the order says: these clients are real, so their noise must not follow from a seed it knows
        order = replace(order, local=local, deployed=True)
        of_run, in_all = self.client_states.request_counts(ask.run)
        self.policy.check_request(order, ask.settings, num_requests_of_run=of_run, num_requests_total=in_all)
        self._spend(scenario, strategy, order, clients)
        self.client_states.count_request(ask.run)
        return strategy, order, since

    def _mask(self, ask: RequestHeader, parcel: Payload) -> bytes:
        """A message of secure aggregation for each client; with an order they train, and what they bring is masked."""
        if self.config.masking_keys is None:
            raise PolicyViolation(f"this node has no {MASKING_KEY}, so that it takes part in no masked sum")
        scenario = self._scenario(ask)
        clients = self._here(scenario, ask.clients)
        messages, told = read_mask_request(parcel, ask)
        registered = self.config.masking_keys.check_registered(told)
        strategy, _ = self._protected(ask, LocalSettings(), scenario)
        bring: dict[ClientId, Callable[[], Updates | Failure]] = {}
        if "params" in parcel.arrays:
            strategy, order, since = self._admitted(ask, parcel, scenario, clients)
            train = partial(self._train, scenario, strategy, order)
            bring = {client: partial(train, client, ask.run, since[client]) for client in clients}
        least = max(self.policy.required_privacy.min_clients_in_sum, _threshold(strategy))
        said = {
            client: self._say(ask.run, client, messages[client], bring.get(client), registered=registered, least=least)
            for client in clients
        }
        failures = [one for one in said.values() if isinstance(one, Failure)]
        return pack_mask_response(
            ask, {client: one for client, one in said.items() if isinstance(one, bytes)}, failures
        )

    def _say(
        self,
        run: str,
        client: ClientId,
        message: bytes,
        bring: Callable[[], Updates | Failure] | None,
        *,
        registered: Mapping[ClientId, bytes],
        least: int,
    ) -> bytes | Failure:
        """One client's answer in secure aggregation; ``bring`` trains where the message asks for its update."""
        from fedlearn.privacy.secagg import client as secagg
        from fedlearn.privacy.secagg.crypto import Identity
        from fedlearn.privacy.secagg.errors import ProtocolError as RefusedMessage

        assert self.config.masking_keys is not None
        result = bring and bring()
        if isinstance(result, Failure):
            return result
        me = Identity(client, self.config.masking_keys.private_key)
        own = secagg.Client(
            me, registered, state=self.client_states.load_secagg_state(run, client), min_threshold=least
        )
        try:
            answer = own.respond(message, lambda _: as_numpy(result.delta_KD)[0]) if result else own.respond(message)
        except RefusedMessage as error:
            log.warning("client %d refused a message of run %s: %s", client, run, error)
            return Failure(client=client, stage=FailureStage.REQUEST, reason=str(error))
        self.client_states.save_secagg_state(run, client, own.state)
        return answer

    def _train(
        self, scenario: Scenario, strategy: Strategy, order: Request, client: ClientId, run: str, since: int
    ) -> Updates | Failure:
        engine = serial(scenario.data, scenario.trainer)
        try:
            initial = initial_client_state(strategy, engine.layout, order.params_D)
            engine.client_states[client] = self.client_states.load(run, client, since, initial)
            (result,) = engine.fit(order, strategy, [client])
            if isinstance(result, Updates) and initial:
                self.client_states.save(run, client, order.round, engine.client_states[client])
        except (ClientStateError, OSError) as error:
            result = failure(client, FailureStage.CLIENT_STATE, error)
        if isinstance(result, Failure):
            log.error("client %d failed in %s: %s\n%s", client, result.stage, result.reason, result.traceback)
        return result

    def _evaluate(self, ask: RequestHeader, parcel: Payload) -> bytes:
        scenario = self._scenario(ask)
        clients = self._here(scenario, ask.clients)
        params_D = read_params(parcel, scenario.trainer.layout)
        least = self.policy.reveal.min_test_examples
        told = [client for client in clients if len(scenario.data.test(client)) >= least and self.policy.reveal.metrics]
        for client in set(clients) - set(told):
            log.info("client %d is not evaluated, by this node's policy", client)
        judged: Iterable[Predictions | Failure]
        if "since" in parcel.metadata:  # each client is asked for its own model, as it was after that round
            strategy, _ = self._protected(ask, LocalSettings(), scenario)
            since = read_state_rounds(parcel)
            judged = [self._judge(scenario, strategy, params_D, client, ask.run, since[client]) for client in told]
        else:
            judged = serial(scenario.data, scenario.trainer).evaluate(params_D, told)
        return pack_evaluation_response(ask, [self._tally(scenario, one) for one in judged])

    def _judge(
        self, scenario: Scenario, strategy: Strategy, params_D: np.ndarray, client: ClientId, run: str, since: int
    ) -> Predictions | Failure:
        """The outputs of one client's own model."""
        engine = serial(scenario.data, scenario.trainer)
        try:
            initial = initial_client_state(strategy, engine.layout, params_D)
            engine.client_states[client] = self.client_states.load(run, client, since, initial)
        except ClientStateError as error:
            return failure(client, FailureStage.CLIENT_STATE, error)
        (one,) = engine.evaluate(params_D, [client], strategy)
        return one

    def _tally(self, scenario: Scenario, one: Predictions | Failure) -> ClientEvaluation | Failure:
        if isinstance(one, Failure):
            return one
        return evaluate_client(one, task=scenario.data.task, num_classes=scenario.data.num_classes)

    def _told(self, result: Updates | Failure) -> Updates | Failure:
        """An update with the number of examples that this node tells."""
        if isinstance(result, Failure):
            return result
        told_K = np.array([self.policy.reveal.reported_count(int(count)) for count in result.num_examples_K], np.int64)
        if (told_K == result.num_examples_K).all():
            return result
        # the sums of metrics would tell the number too
        metrics = {name: MetricSum(told_K * (s.total_K / s.count_K), told_K) for name, s in result.metrics.items()}
        return replace(result, num_examples_K=told_K, metrics=metrics)

    def _here(self, scenario: Scenario, clients: Sequence[ClientId]) -> tuple[ClientId, ...]:
        elsewhere = [client for client in clients if client not in self.config.clients]
        if elsewhere:
            raise WireError(f"clients {elsewhere} do not live at this node, which has {list(self.config.clients)}")
        unknown = [client for client in clients if client not in scenario.data.clients]
        if unknown:
            raise WireError(f"scenario {scenario.name} has no clients {unknown}: it has {len(scenario.data.clients)}")
        return tuple(sorted(clients))

    def _scenario(self, ask: RequestHeader) -> Scenario:
        """The scenario of a request's words, as far as the policy accepts them."""
        self.policy.check_settings(ask.settings)
        scenario: Scenario = self._once("scenario", self._own_words(ask.settings["scenario"]), Scenario)
        return scenario

    def _protected(
        self, ask: RequestHeader, local: LocalSettings, scenario: Scenario
    ) -> tuple[Strategy, LocalSettings]:
        """The strategy and training of an order, protected as its words say and not as its numbers might."""
        strategy, local = self._promised(ask, local)
        strategy = with_buffer_policy(strategy, scenario.trainer.layout, str(ask.settings.get("buffers") or "refuse"))
        return self._compressed(ask, strategy), local

    def _promised(self, ask: RequestHeader, local: LocalSettings) -> tuple[Strategy, LocalSettings]:
        strategy: Strategy = self._once("strategy", ask.settings["strategy"], Strategy)
        local, words = replace(local, example_dp=None), ask.settings.get("privacy")
        if not words:
            return strategy, local
        mechanism: Mechanism = self._once("privacy", words, Mechanism)
        given = read_fields(ask.settings.get("population") or {}, num_clients=int, rounds=int)
        if min(given.values()) < 1:
            raise WireError(f"the order's population is {given}, expected numbers >= 1")
        population = Population(clients=range(given["num_clients"]), rounds=given["rounds"])
        return mechanism.protect(strategy, local, population)

    def _compressed(self, ask: RequestHeader, strategy: Strategy) -> Strategy:
        words = ask.settings.get("compress")
        return with_compression(strategy, self._once("compress", words, Stage)) if words else strategy

    def _spend(self, scenario: Scenario, strategy: Strategy, order: Request, clients: Sequence[ClientId]) -> None:
        """Charge this node's own ledger, if the policy has a limit; refuse an order that would pass it."""
        limit, protection = self.policy.required_privacy, strategy.privacy_guarantee
        if limit.max_epsilon is None or protection is None:
            return
        sizes = np.array([len(scenario.data.train(client)) for client in clients])
        release = Release(
            round=order.round,
            clients=tuple(clients),
            num_examples=tuple(sizes.tolist()),
            num_steps=tuple(order.local.num_steps(sizes).tolist()),
        )
        budget = PrivacyBudget(self.client_states.folder)
        reason = budget.refusal_reason(protection, release, epsilon=limit.max_epsilon, delta=limit.delta)
        if reason:
            raise PolicyViolation(reason)
        budget.charge(protection, release)

    def _own_words(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """A scenario's settings, with what only the operator may say."""
        takes = inspect.signature(get_object(words["_target_"])).parameters  # accepted by the policy, by its full name
        own: dict[str, Any] = {
            "path": str(self.config.data) if self.config.data else None,
            "device": self.config.device,
        }
        own["deployed"] = True  # to scenarios for which it makes a difference
        own |= {"framework": self.config.framework} if self.config.framework else {}
        return {**words, **{name: value for name, value in own.items() if name in takes}}

    def _once(self, group: str, words: Mapping[str, Any], kind: type[Any]) -> Any:
        key = f"{group} {json.dumps(words, sort_keys=True)}"
        if key not in self._built:
            made = build(dict(words), group, allow=self.policy.allow_targets)
            if not isinstance(made, kind):
                raise WireError(f"{words['_target_']} builds a {type(made).__name__}, expected a {kind.__name__}")
            while len(self._built) >= MAX_CACHED:
                del self._built[next(iter(self._built))]
            self._built[key] = made
        return self._built[key]


def _threshold(strategy: Strategy) -> int:
    """The fewest clients whose sum this strategy opens, as far as its own words say.

    Raises:
        WireError: it does not mask.
    """
    threshold = strategy.privacy_guarantee.threshold if strategy.privacy_guarantee else None
    if threshold is None:
        raise WireError("the order's words mask no updates; expected privacy=secagg or privacy=distributed")
    return int(threshold)
