"""Train and evaluate the clients of a node. A request names the round of the client state of each client.

The code is the same as in a simulation: the serial engine trains one client at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.metrics import evaluate_client
from fedlearn.core.records import (
    ClientEvaluation,
    ClientId,
    Failure,
    FailureStage,
    MetricSum,
    Predictions,
    Request,
    Updates,
)
from fedlearn.deploy.node_side.client_states import ClientStateError, ClientStates
from fedlearn.deploy.node_side.noisy_evaluation import noisy_evaluation
from fedlearn.deploy.node_side.reveal import Reveal
from fedlearn.engines.base import serial
from fedlearn.engines.block_training import failure
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.scenario import Scenario

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalClients:
    """The clients of a node in one run.

    Args:
        scenario: data and trainer.
        client_states: stored client states.
        run: name of the run.
    """

    scenario: Scenario
    client_states: ClientStates
    run: str

    def train(self, strategy: Strategy, request: Request, client: ClientId, state_round: int) -> Updates | Failure:
        """Train one client and save its new client state.

        Args:
            strategy: strategy of the request.
            request: training request.
            client: id of the client.
            state_round: round of the client state to start from; 0: the initial state.
        """
        engine = serial(self.scenario.data, self.scenario.trainer)
        try:
            initial = initial_client_state(strategy, engine.layout, request.params_D)
            engine.client_states[client] = self.client_states.load(self.run, client, state_round, initial)
            (result,) = engine.fit(request, strategy, [client])
            if isinstance(result, Updates) and initial:
                self.client_states.save(self.run, client, request.round, engine.client_states[client])
        except (ClientStateError, OSError) as error:
            result = failure(client, FailureStage.CLIENT_STATE, error)
        if isinstance(result, Failure):
            log.error("client %d failed at stage %s: %s\n%s", client, result.stage, result.reason, result.traceback)
        return result

    def evaluate(self, params_D: np.ndarray, clients: Sequence[ClientId]) -> list[ClientEvaluation | Failure]:
        """Evaluate the global model on the held-out part of each client."""
        engine = serial(self.scenario.data, self.scenario.trainer)
        return [self._summarize(result) for result in engine.evaluate(params_D, clients)]

    def evaluate_personal(
        self, strategy: Strategy, params_D: np.ndarray, client: ClientId, state_round: int
    ) -> ClientEvaluation | Failure:
        """Evaluate the personal model of one client, with its client state after ``state_round``."""
        engine = serial(self.scenario.data, self.scenario.trainer)
        try:
            initial = initial_client_state(strategy, engine.layout, params_D)
            engine.client_states[client] = self.client_states.load(self.run, client, state_round, initial)
        except ClientStateError as error:
            return failure(client, FailureStage.CLIENT_STATE, error)
        (result,) = engine.evaluate(params_D, [client], strategy)
        return self._summarize(result)

    def evaluate_noisy(
        self, params_D: np.ndarray, clients: Sequence[ClientId], epsilon: float
    ) -> list[ClientEvaluation]:
        """Evaluate the global model on the held-out part of each client, with noise; see `noisy_evaluation`.

        The trainer sees one example at a time, so no output depends on another example. A client without held-out
        examples sends noise only, so a response does not reveal whether a client has examples.
        """
        data, predict, results = self.scenario.data, self.scenario.trainer.predict, []
        for client in clients:
            test = data.test(client)
            rows = [predict(params_D, test.x[row : row + 1]) for row in range(len(test))]
            outputs = np.concatenate(rows) if rows else np.zeros((0, max(2, data.num_classes)))
            predictions = Predictions(client=client, outputs=outputs, targets=np.asarray(test.y))
            results.append(noisy_evaluation(predictions, task=data.task, num_classes=data.num_classes, epsilon=epsilon))
        return results

    def with_enough_examples(self, clients: Sequence[ClientId], minimum: int) -> tuple[ClientId, ...]:
        """Return the clients with at least ``minimum`` held-out examples, and log the others."""
        chosen = tuple(client for client in clients if len(self.scenario.data.test(client)) >= minimum)
        for client in sorted(set(clients) - set(chosen)):
            log.info("client %d is not evaluated: it has fewer than %d held-out examples", client, minimum)
        return chosen

    def _summarize(self, result: Predictions | Failure) -> ClientEvaluation | Failure:
        if isinstance(result, Failure):
            return result
        data = self.scenario.data
        return evaluate_client(result, task=data.task)


def with_reported_counts(update: Updates, reveal: Reveal) -> Updates:
    """Return an update whose example counts and metric sums have the precision that the policy reveals."""
    counts = [reveal.reported_count(int(count)) for count in update.num_examples_K]
    reported_K = np.array(counts, np.int64)
    if (reported_K == update.num_examples_K).all():
        return update
    metrics = {name: MetricSum(reported_K * (s.total_K / s.count_K), reported_K) for name, s in update.metrics.items()}
    return replace(update, num_examples_K=reported_K, metrics=metrics)
