"""Train baselines for a federated run: one model on the pooled data, and one model per client on its own data.

The baselines use the trainer, the initial parameters and the local settings of the run, but no strategy and no privacy
mechanism. The budget is the same, too: a baseline makes as many passes over the data as a federated client on average.

Shapes: K clients in a block, D parameters of the flat vector.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.callbacks.run_history import client_statistics, finite_or_none
from fedlearn.core.arrays import as_numpy
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import ClientId, ClientWork, Evaluation, Examples, LocalSettings, Predictions, Request
from fedlearn.core.schedules import over_whole_run
from fedlearn.engines.base import split_into_blocks
from fedlearn.loop.evaluation_round import select_evaluation_clients
from fedlearn.loop.scenario import in_target_unit, judge
from fedlearn.runner.experiment import Experiment

BLOCK_SIZE = 64  # clients per block that train their local models at once
log = logging.getLogger(__name__)


def train_baselines(
    experiment: Experiment, *, num_client_updates: int, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, dict[str, Any]]:
    """Train the baselines of the plan, and return their metrics.

    Args:
        experiment: data, trainer, and settings, including the names of the baselines.
        num_client_updates: number of client updates of the federated run, >= 0; it determines the budget.
        should_stop: function that returns True to stop. A baseline that is incomplete at this moment is omitted.

    Returns:
        Name -> ``test`` (metric -> value on the pooled held-out examples) and ``clients`` (metric -> ``mean``, ``std``,
        ``worst10``), as in ``metrics.jsonl``. ``local`` evaluates the model of each client on the held-out examples of
        this client. A baseline without held-out examples is absent.
    """
    evaluated = select_evaluation_clients(
        experiment.scenario.data.clients, experiment.plan.schedule, experiment.plan.seed
    )
    baselines = {"central": _central, "local": _local}
    metrics = {}
    for name in experiment.plan.baselines:
        log.info("baseline %s: %s", name, _budget(experiment, num_client_updates))
        evaluation = baselines[name](experiment, evaluated, num_client_updates, should_stop)
        if should_stop():
            break
        if evaluation is None:  # there are no held-out examples
            continue
        test = {metric: finite_or_none(value) for metric, value in evaluation.pooled.items()}
        clients = {metric: client_statistics(evaluation, metric) for metric in evaluation.per_client}
        metrics[name] = {"test": test, "clients": clients}
    return metrics


def _central(
    experiment: Experiment, evaluated: Sequence[ClientId], client_updates: int, should_stop: Callable[[], bool]
) -> Evaluation | None:
    scenario, data = experiment.scenario, experiment.scenario.data
    pooled = _concatenate([data.train(client) for client in data.clients])
    request = _request(experiment, client_updates, step_factor=len(data.clients))
    (params_D,) = _train(experiment, request, [ClientWork(client=len(data.clients), examples=pooled)])
    if should_stop():
        return None
    parts = [_predictions(experiment, params_D, client) for client in evaluated]
    return judge(scenario)(params_D, [part for part in parts if len(part.targets)])


def _local(
    experiment: Experiment, evaluated: Sequence[ClientId], client_updates: int, should_stop: Callable[[], bool]
) -> Evaluation | None:
    data = experiment.scenario.data
    request, parts = _request(experiment, client_updates), list[Predictions]()
    with_data = [client for client in evaluated if len(data.train(client)) and len(data.test(client))]
    for block in split_into_blocks(with_data, BLOCK_SIZE):
        work = [ClientWork(client=client, examples=data.train(client)) for client in block]
        models = zip(_train(experiment, request, work), block, strict=True)
        parts += [_predictions(experiment, params_D, client) for params_D, client in models]
        if should_stop():
            return None
    return in_target_unit(evaluate(parts, task=data.task), experiment.scenario)


def _train(experiment: Experiment, request: Request, work: Sequence[ClientWork]) -> Iterator[np.ndarray]:
    delta_KD = as_numpy(experiment.scenario.trainer.fit(request, plain_training, work).delta_KD)
    return (as_numpy(request.params_D) + delta_D for delta_D in delta_KD)


def _predictions(experiment: Experiment, params_D: np.ndarray, client: ClientId) -> Predictions:
    test = experiment.scenario.data.test(client)
    return Predictions(client=client, outputs=experiment.scenario.trainer.predict(params_D, test.x), targets=test.y)


def _request(experiment: Experiment, client_updates: int, *, step_factor: int = 1) -> Request:
    """Return a request for the whole training. If ``local.steps`` is set, ``step_factor`` multiplies the steps."""
    local = _budget(experiment, client_updates)
    local = replace(local, steps=local.steps * step_factor) if local.steps else local
    params_D = experiment.scenario.trainer.init(experiment.plan.seed)
    return Request(round=1, seed=experiment.plan.seed, params_D=params_D, local=local)


def _budget(experiment: Experiment, client_updates: int) -> LocalSettings:
    local, num_clients = replace(experiment.plan.local, example_dp=None), len(experiment.scenario.data.clients)
    rounds = experiment.plan.schedule.rounds
    local = replace(local, schedule=over_whole_run(local.schedule, rounds))
    if local.steps:
        return replace(local, steps=max(1, round(client_updates * local.steps / num_clients)))
    return replace(local, epochs=max(1, round(client_updates * local.epochs / num_clients)))


def _concatenate(parts: Sequence[Examples]) -> Examples:
    return Examples(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))
