"""Updates that a server observes, and the privacy guarantee for one update. Privacy attacks use both.

Shapes: B victims, D parameters.
"""

from __future__ import annotations

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import LocalSettings, Updates
from fedlearn.errors import FedlearnError
from fedlearn.loop.training_loop import next_request, start
from fedlearn.privacy.mechanisms.base import Mechanism, Population
from fedlearn.runner.experiment import Experiment

CLIENT_SIDE_MECHANISMS = ("example", "local")  # mechanisms that protect a single update against the server


def apply_mechanism(
    mechanism: Mechanism, experiment: Experiment, *, num_examples: int
) -> tuple[Strategy, LocalSettings, float | None, float | None]:
    """Apply a privacy mechanism to an experiment, and compute its guarantee for one update.

    Args:
        mechanism: privacy mechanism.
        experiment: experiment without a privacy mechanism.
        num_examples: number of examples of each client.

    Returns:
        Strategy, local settings, epsilon and delta. Epsilon and delta are None if the mechanism has no guarantee
        against the server.
    """
    mechanism.validate(experiment.plan.strategy, experiment.plan.local)
    population = Population(clients=experiment.engine.clients, rounds=1, num_examples_of=lambda client: num_examples)
    strategy, local = mechanism.protect(experiment.plan.strategy, experiment.plan.local, population)
    protection = strategy.privacy_guarantee
    if protection is None or mechanism.kind not in CLIENT_SIDE_MECHANISMS:
        return strategy, local, None, None
    ledger = protection.charge(Ledger(), Release(round=1, clients=(experiment.engine.clients[0],)))
    spent = protection.epsilon_of(ledger)
    assert spent is not None  # every mechanism in `CLIENT_SIDE_MECHANISMS` has an epsilon
    return strategy, local, spent.value, float(protection.delta or 0.0)


def observe_updates(experiment: Experiment, strategy: Strategy, local: LocalSettings) -> np.ndarray:
    """Run the first round and return the update of each client, ``(B, D)``, in order of the clients.

    Raises:
        FedlearnError: A client failed, or the strategy has personal parameters.
    """
    engine, seed = experiment.engine, experiment.plan.seed
    if strategy.local.personal_parameters:
        names = ", ".join(strategy.local.personal_parameters)
        raise FedlearnError(
            f"the strategy has the personal parameters {names}, but the attacks need whole models\n"
            "  expected  a strategy without personal parameters\n  try       strategy=fedavg"
        )
    state = start(strategy, experiment.scenario.trainer.init(seed), engine, seed=seed)
    request = next_request(strategy, engine, state, local)
    results = list(engine.fit(request, strategy, tuple(engine.clients)))
    for failure in results:
        if not isinstance(failure, Updates):
            reason = getattr(failure, "reason", "it sent no update")
            raise FedlearnError(
                f"an attacked client failed: {reason}\n  expected  an update of each client\n"
                "  advice    a smaller local.learning_rate"
            )
    return np.concatenate([as_numpy(result.delta_KD) for result in results if isinstance(result, Updates)])
