"""Evaluate the global model and the personal models after a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientId,
    Evaluation,
    Failure,
    Predictions,
    ServerState,
    sorted_client_ids,
)
from fedlearn.loop.protocols import Engine
from fedlearn.loop.schedule import Schedule

# (params_D, results of clients) -> Evaluation. params_D is None if each client uses a personal model. The list is empty
# if no client has held-out examples. The result is None if the scenario has no other examples.
Evaluate = Callable[[Array | None, Sequence[Predictions] | Sequence[ClientEvaluation]], Evaluation | None]


def evaluate_round(
    strategy: Strategy, engine: Engine, state: ServerState, schedule: Schedule, evaluate: Evaluate
) -> tuple[Evaluation | None, tuple[Failure, ...]]:
    """Evaluate the global model and the personal models on the held-out examples of clients.

    With personal parameters, there is no complete global model, and only the personal models are evaluated.

    Returns:
        The evaluation, or None if there are no examples; and the failures of clients.
    """
    rule, cohort = strategy.local, select_evaluation_clients(engine.clients, schedule, state.seed)
    if rule.personal_parameters:
        return _evaluate_results(engine.evaluate(state.params_D, cohort, strategy), None, evaluate)
    evaluation, failures = _evaluate_results(engine.evaluate(state.params_D, cohort), state.params_D, evaluate)
    if not (evaluation and rule.personal):
        return evaluation, failures
    results = engine.evaluate(state.params_D, cohort, strategy)
    personal, personal_failures = _evaluate_results(results, None, evaluate)
    return replace(evaluation, personal=personal), failures + personal_failures


def _evaluate_results(
    results: Iterable[Any], params_D: Array | None, evaluate: Evaluate
) -> tuple[Evaluation | None, tuple[Failure, ...]]:
    """Return the evaluation of the successful results, and the failures."""
    results = list(results)
    successes: list[Any] = [result for result in results if not isinstance(result, Failure)]
    failures = tuple(result for result in results if isinstance(result, Failure))
    return (evaluate(params_D, successes) if successes or params_D is not None else None), failures


def select_evaluation_clients(clients: Sequence[ClientId], schedule: Schedule, seed: int) -> Sequence[ClientId]:
    """Return the clients that a run evaluates: all, or a random sample that stays the same in all rounds."""
    if len(clients) <= schedule.evaluate_clients:
        return clients
    positions = generator(seed, Purpose.EVALUATE).choice(len(clients), schedule.evaluate_clients, replace=False)
    return sorted_client_ids([clients[i] for i in positions])
