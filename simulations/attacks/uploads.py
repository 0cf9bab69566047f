"""What attacks look at: the updates that clients send, and what was promised of them.

Shapes: B victims, D parameters laid flat.
"""

from __future__ import annotations

import numpy as np

from fedlearn.arrays import as_numpy
from fedlearn.config import Experiment
from fedlearn.errors import FedlearnError
from fedlearn.privacy.ledger import Ledger
from fedlearn.privacy.mechanism import Mechanism, Population
from fedlearn.privacy.protection import Release
from fedlearn.records import LocalSettings, Order, Updates
from fedlearn.strategy import Strategy

AT_THE_CLIENT = ("example", "local")  # mechanisms that protect against whoever sees an upload


def protected(
    mechanism: Mechanism, made: Experiment, *, examples: int
) -> tuple[Strategy, LocalSettings, float | None, float | None]:
    """The experiment's strategy and local settings under a mechanism, and what that claims of one upload.

    Args:
        mechanism: to protect it by.
        made: an experiment without protection.
        examples: of each client.

    Returns:
        strategy, local settings, epsilon and delta; both None where nothing is claimed against the server.
    """
    mechanism.refuse(made.plan.strategy, made.plan.local)
    population = Population(clients=made.engine.clients, rounds=1, size_of=lambda client: examples)
    strategy, local = mechanism.protect(made.plan.strategy, made.plan.local, population)
    protection = strategy.protection
    if protection is None or mechanism.kind not in AT_THE_CLIENT:
        return strategy, local, None, None
    ledger = protection.charge(Ledger(), Release(round=1, clients=(made.engine.clients[0],)))
    spent = protection.spent(ledger)
    assert spent is not None  # every kind of `AT_THE_CLIENT` promises one
    return strategy, local, spent.value, float(protection.facts["delta"])


def uploads(made: Experiment, strategy: Strategy, local: LocalSettings) -> np.ndarray:
    """What leaves each client in the first round, in order: ``(B, D)``.

    Raises:
        FedlearnError: a client failed.
    """
    engine, seed = made.engine, made.plan.seed
    if strategy.local.keeps:
        kept = ", ".join(strategy.local.keeps)
        raise FedlearnError(
            f"{kept} never leave the clients, but the attacks read whole models\n  try       strategy=fedavg"
        )
    sent = [stage.server.broadcast(stage.server.init(strategy.leaving(engine.layout))) for stage in strategy.stages]
    broadcast = {f"stage/{i}/{name}": value for i, own in enumerate(sent) for name, value in own.items()}
    params_D = made.scenario.trainer.init(seed)
    order = Order(round=1, seed=seed, params_D=params_D, local=local, broadcast=broadcast)
    results = list(engine.fit(order, strategy, tuple(engine.clients)))
    for failure in results:
        if not isinstance(failure, Updates):
            reason = getattr(failure, "reason", "it sent nothing that can be attacked")
            raise FedlearnError(f"a client under attack failed: {reason}\n  try       a smaller local.learning_rate")
    return np.concatenate([as_numpy(result.delta_KD) for result in results if isinstance(result, Updates)])
