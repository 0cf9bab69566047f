"""A reproducible problem: data at clients, a model, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import Array, ClientEvaluation, ClientId, Evaluation, Examples, Predictions
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.training_loop import Evaluate


@dataclass(frozen=True, kw_only=True)
class CharacterEncoding:
    """Encode text for a model that predicts the next character.

    Args:
        alphabet: characters with the numbers 1, 2, ...; 0 is padding. Other characters have the number of the last one.
        length: characters that the model receives at once.

    >>> CharacterEncoding(alphabet="ab ", length=80).encode("ba!").tolist()
    [2, 1, 3]
    """

    alphabet: str
    length: int

    def encode(self, text: str) -> np.ndarray:
        """Return ``(T,)`` int32 numbers from 1."""
        numbers = {character: number for number, character in enumerate(self.alphabet, 1)}
        return np.array([numbers.get(character, len(self.alphabet)) for character in text], np.int32)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Describe the problem of an experiment: data, trainer and metrics, without the algorithm.

    Args:
        name: short; names the run folder.
        data: examples by client.
        trainer: the model in its framework.
        model: description of the model for the header, e.g. ``mlp 13-32-1``; empty for none.
        metric: to lead with in tables and figures; None takes the task's (see `fedlearn.core.metrics.main_metric`).
        partition: how the data came to lie at the clients, e.g. ``natural`` or ``dirichlet(0.3)``.
        read_inputs: reads model inputs ``(N, ...)`` from a file of new examples, or from a folder of images.
        disclosure: what preparing the data has told of clients, in words; empty for nothing.
        ledger: what that has cost the clients, if noise covers each of their records; else empty.
        target_scale: (centre, spread) of a regression's target: a prediction is ``centre + spread * output``.
        backdoor_examples: held-out examples with an attack's trigger and target; None where there is no backdoor.
        files: small texts that belong to the model, by file name, e.g. its vocabulary; a run folder holds them.
        characters: encoding of a language model that predicts the next character; None for other models.
    """

    name: str
    data: FederatedData
    trainer: Trainer
    model: str = ""
    metric: str | None = None
    partition: str = "natural"
    target_scale: tuple[float, float] = (0.0, 1.0)
    read_inputs: Callable[[Path], np.ndarray] | None = None
    disclosure: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    backdoor_examples: Callable[[Examples], Examples] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    characters: CharacterEncoding | None = None


def judge(scenario: Scenario) -> Evaluate:
    """Return the evaluation of a scenario, for `federate`: pooled and per client, with the metrics of its task.

    Where each client uses a model of its own, their examples together are what is pooled.

    Clients that do not send outputs send a `ClientEvaluation` each; their metric sums are then pooled.

    Where no client holds anything out, the global model is judged on the scenario's own test alone, if it has one.
    """
    from fedlearn.core.metrics import combine_evaluations, evaluate

    data = scenario.data

    def judged(params_D: Array | None, parts: Sequence[Predictions] | Sequence[ClientEvaluation]) -> Evaluation | None:
        tallies = [part for part in parts if isinstance(part, ClientEvaluation)]
        if tallies:
            return combine_evaluations(tallies, task=data.task)
        predictions = [part for part in parts if isinstance(part, Predictions)]
        pooled = None
        if data.pooled_test is not None and params_D is not None:
            test = data.pooled_test()
            pooled = Predictions(client=-1, outputs=scenario.trainer.predict(params_D, test.x), targets=test.y)
        if not predictions and pooled is None:
            return None
        seen = evaluate(predictions, task=data.task, pooled=pooled)
        if scenario.backdoor_examples is None or params_D is None:
            return seen
        success = _attack_success(scenario, params_D, seen.clients, scenario.backdoor_examples)
        return replace(seen, pooled={**seen.pooled, "attack_success": success})

    return judged


def _attack_success(
    scenario: Scenario, params_D: Array, clients: Sequence[ClientId], triggered: Callable[[Examples], Examples]
) -> float:
    """The share of held-out examples that a backdoor's trigger turns into its target; NaN where there are none."""
    shown = [triggered(scenario.data.test(client)) for client in clients]
    if not shown:
        return float("nan")
    x, y = np.concatenate([some.x for some in shown]), np.concatenate([some.y for some in shown])
    outputs = scenario.trainer.predict(params_D, x)
    told = outputs.argmax(axis=1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
    return float(np.mean(told == y)) if len(y) else float("nan")
