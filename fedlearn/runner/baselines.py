"""What a federation is held against: one model of everybody's data together, and a model of each client alone.

Both are trained by the run's own trainer, from the same initial parameters, with the same local settings (no strategy,
no privacy mechanism) and the same budget: as many passes over the data as the federated clients made on average.

Shapes: K clients in a block, D parameters laid flat.
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
from fedlearn.engines.base import split_into_blocks
from fedlearn.loop.scenario import judge
from fedlearn.loop.training_loop import select_evaluation_clients
from fedlearn.runner.config import Experiment

BLOCK_SIZE = 64  # clients that train alone, at a time
log = logging.getLogger(__name__)


def train_baselines(
    experiment: Experiment, *, num_client_updates: int, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, dict[str, Any]]:
    """Metrics of each baseline that the plan asks for.

    Args:
        experiment: whose data, trainer and settings to use.
        num_client_updates: that the federated run has had.
        should_stop: asked now and then; what is not done by then is left out.

    Returns:
        name -> ``test`` (metric -> value on all held-out examples together) and ``clients`` (metric -> ``mean``,
        ``std``, ``worst10``), as a line of ``metrics.jsonl`` has them. ``local`` judges each client's own model on the
        client's own held-out examples.
    """
    judged = select_evaluation_clients(experiment.scenario.data.clients, experiment.plan.schedule, experiment.plan.seed)
    made = {"central": _central, "local": _alone}
    found = {}
    for name in experiment.plan.baselines:
        log.info("baseline %s: %s", name, _budget(experiment, num_client_updates))
        seen = made[name](experiment, judged, num_client_updates, should_stop)
        if should_stop():
            break
        if seen is None:  # nothing is held out
            continue
        test = {metric: finite_or_none(value) for metric, value in seen.pooled.items()}
        found[name] = {"test": test, "clients": {metric: client_statistics(seen, metric) for metric in seen.per_client}}
    return found


def _central(
    experiment: Experiment, judged: Sequence[ClientId], client_updates: int, stopped: Callable[[], bool]
) -> Evaluation | None:
    scenario, data = experiment.scenario, experiment.scenario.data
    together = _end_to_end([data.train(client) for client in data.clients])
    order = _order(experiment, client_updates, steps_of=len(data.clients))
    (params_D,) = _fitted(experiment, order, [ClientWork(client=len(data.clients), examples=together)])
    if stopped():
        return None
    parts = [_predictions(experiment, params_D, client) for client in judged]
    return judge(scenario)(params_D, [part for part in parts if len(part.targets)])


def _alone(
    experiment: Experiment, judged: Sequence[ClientId], client_updates: int, stopped: Callable[[], bool]
) -> Evaluation | None:
    data = experiment.scenario.data
    order, parts = _order(experiment, client_updates), list[Predictions]()
    for block in split_into_blocks(
        [client for client in judged if len(data.train(client)) and len(data.test(client))], BLOCK_SIZE
    ):
        models = _fitted(
            experiment, order, [ClientWork(client=client, examples=data.train(client)) for client in block]
        )
        parts += [_predictions(experiment, own_D, client) for own_D, client in zip(models, block, strict=True)]
        if stopped():
            return None
    return evaluate(parts, task=data.task)


def _fitted(experiment: Experiment, order: Request, work: Sequence[ClientWork]) -> Iterator[np.ndarray]:
    delta_KD = as_numpy(experiment.scenario.trainer.fit(order, plain_training, work).delta_KD)
    return (as_numpy(order.params_D) + delta_D for delta_D in delta_KD)


def _predictions(experiment: Experiment, params_D: np.ndarray, client: ClientId) -> Predictions:
    test = experiment.scenario.data.test(client)
    return Predictions(client=client, outputs=experiment.scenario.trainer.predict(params_D, test.x), targets=test.y)


def _order(experiment: Experiment, client_updates: int, *, steps_of: int = 1) -> Request:
    """To train from the beginning to the end at once; ``steps_of`` clients' steps where these are counted."""
    local = _budget(experiment, client_updates)
    local = replace(local, steps=local.steps * steps_of) if local.steps else local
    params_D = experiment.scenario.trainer.init(experiment.plan.seed)
    return Request(round=1, seed=experiment.plan.seed, params_D=params_D, local=local)


def _budget(experiment: Experiment, client_updates: int) -> LocalSettings:
    local, num_clients = replace(experiment.plan.local, example_dp=None), len(experiment.scenario.data.clients)
    if local.steps:
        return replace(local, steps=max(1, round(client_updates * local.steps / num_clients)))
    return replace(local, epochs=max(1, round(client_updates * local.epochs / num_clients)))


def _end_to_end(parts: Sequence[Examples]) -> Examples:
    return Examples(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))
