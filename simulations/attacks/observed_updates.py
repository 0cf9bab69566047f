"""What attacks look at: the updates that clients send, and what was promised of them.

Shapes: B victims, D parameters laid flat.
"""

from __future__ import annotations

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import LocalSettings, Request, Updates
from fedlearn.errors import FedlearnError
from fedlearn.privacy.mechanisms.base import Mechanism, Population
from fedlearn.runner.config import Experiment

CLIENT_SIDE_MECHANISMS = ("example", "local")  # mechanisms that protect against whoever sees an upload


def apply_mechanism(
    mechanism: Mechanism, experiment: Experiment, *, num_examples: int
) -> tuple[Strategy, LocalSettings, float | None, float | None]:
    """The experiment's strategy and local settings under a mechanism, and what that claims of one upload.

    Args:
        mechanism: to protect it by.
        experiment: an experiment without protection.
        num_examples: of each client.

    Returns:
        strategy, local settings, epsilon and delta; both None where nothing is claimed against the server.
    """
    mechanism.validate(experiment.plan.strategy, experiment.plan.local)
    population = Population(clients=experiment.engine.clients, rounds=1, num_examples_of=lambda client: num_examples)
    strategy, local = mechanism.protect(experiment.plan.strategy, experiment.plan.local, population)
    protection = strategy.privacy_guarantee
    if protection is None or mechanism.kind not in CLIENT_SIDE_MECHANISMS:
        return strategy, local, None, None
    ledger = protection.charge(Ledger(), Release(round=1, clients=(experiment.engine.clients[0],)))
    spent = protection.epsilon_of(ledger)
    assert spent is not None  # every kind of `CLIENT_SIDE_MECHANISMS` promises one
    return strategy, local, spent.value, float(protection.delta or 0.0)


def observe_updates(experiment: Experiment, strategy: Strategy, local: LocalSettings) -> np.ndarray:
    """What leaves each client in the first round, in order: ``(B, D)``.

    Raises:
        FedlearnError: a client failed.
    """
    engine, seed = experiment.engine, experiment.plan.seed
    if strategy.local.personal_parameters:
        kept = ", ".join(strategy.local.personal_parameters)
        raise FedlearnError(
            f"{kept} never leave the clients, but the attacks read whole models\n  try       strategy=fedavg"
        )
    sent = [
        stage.server.broadcast(stage.server.init(strategy.shared_layout(engine.layout))) for stage in strategy.stages
    ]
    broadcast = {f"stage/{i}/{name}": value for i, own in enumerate(sent) for name, value in own.items()}
    params_D = experiment.scenario.trainer.init(seed)
    order = Request(round=1, seed=seed, params_D=params_D, local=local, broadcast=broadcast)
    results = list(engine.fit(order, strategy, tuple(engine.clients)))
    for failure in results:
        if not isinstance(failure, Updates):
            reason = getattr(failure, "reason", "it sent nothing that can be attacked")
            raise FedlearnError(f"a client under attack failed: {reason}\n  try       a smaller local.learning_rate")
    return np.concatenate([as_numpy(result.delta_KD) for result in results if isinstance(result, Updates)])
