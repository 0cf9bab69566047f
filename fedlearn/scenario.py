"""A reproducible problem: data at clients, a model, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedlearn.data.federated import FederatedData
from fedlearn.loop import Evaluate
from fedlearn.records import Array, Evaluation, Predictions, Tally
from fedlearn.trainers.base import Trainer


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What an experiment is about, apart from the algorithm.

    Args:
        name: short; names the run folder.
        data: examples by client.
        trainer: the model in its framework.
        model: one line for the header, e.g. ``mlp 13-32-1``.
        partition: how the data came to lie at the clients, e.g. ``natural`` or ``dirichlet(0.3)``.
        files: small texts that belong to the model, by file name, e.g. its vocabulary; a run folder holds them.
    """

    name: str
    data: FederatedData
    trainer: Trainer
    model: str
    partition: str = "natural"
    files: Mapping[str, str] = field(default_factory=dict)


def judge(scenario: Scenario) -> Evaluate:
    """How `federate` evaluates this scenario: pooled and by client, with the metrics of its task.

    Where each client uses a model of its own, their examples together are what is pooled.

    Clients that keep outputs to themselves send a `Tally` each; then the clients' own examples are what is pooled.
    """
    from fedlearn.metrics import combine, evaluate

    data = scenario.data

    def judged(params_D: Array | None, parts: Sequence[Predictions] | Sequence[Tally]) -> Evaluation:
        tallies = [part for part in parts if isinstance(part, Tally)]
        if tallies:
            return combine(tallies, task=data.task)
        predictions = [part for part in parts if isinstance(part, Predictions)]
        pooled = None
        if data.pooled_test is not None and params_D is not None:
            test = data.pooled_test()
            pooled = Predictions(client=-1, outputs=scenario.trainer.predict(params_D, test.x), targets=test.y)
        return evaluate(predictions, task=data.task, pooled=pooled)

    return judged
