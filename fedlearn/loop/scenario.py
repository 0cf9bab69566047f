"""Describe a reproducible problem: data of clients, a model, and its evaluation."""

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
        alphabet: characters with the numbers 1, 2, ...; 0 is padding. Other characters get the last number.
        length: number of characters in one input of the model.

    >>> CharacterEncoding(alphabet="ab ", length=80).encode("ba!").tolist()
    [2, 1, 3]
    """

    alphabet: str
    length: int

    def encode(self, text: str) -> np.ndarray:
        """Return the numbers of the characters, ``(T,)`` int32, from 1."""
        numbers = {character: number for number, character in enumerate(self.alphabet, 1)}
        return np.array([numbers.get(character, len(self.alphabet)) for character in text], np.int32)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Describe the problem of an experiment: data, trainer and metrics, without the algorithm.

    Args:
        name: short name, part of the name of the run folder.
        data: examples of each client.
        trainer: the model in its framework.
        model: description of the model for the header, e.g. ``mlp 13-32-1``; default empty.
        metric: main metric of tables and figures; default the metric of the task (see
            `fedlearn.core.metrics.main_metric`).
        partition: partition of the data over the clients, e.g. ``natural`` (default) or ``dirichlet(0.3)``.
        target_scale: (centre, spread) of a regression target. A prediction is ``centre + spread * output``.
        read_inputs: reads model inputs ``(N, ...)`` from a file of new examples, or from a folder of images.
        disclosure: information about clients that the preparation of the data disclosed; default empty.
        ledger: privacy loss of this disclosure, if noise protects each record; default empty.
        backdoor_examples: changes held-out examples to the trigger and the target of an attack; None for no backdoor.
        files: small texts of the model by file name, e.g. its vocabulary. The run folder contains them.
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
    """Return the evaluation function of a scenario, for `federate`.

    It computes the metrics of the task for each client and for all examples pooled. The examples for the pooled metrics
    come from one of these sources:

    - the test set of the scenario, if it has one and clients use the global model;
    - the held-out examples of all evaluated clients, otherwise;
    - the metric sums of the clients, if clients send a `ClientEvaluation` in place of outputs.

    If no client has held-out examples, the test set of the scenario alone evaluates the global model.
    """
    from fedlearn.core.metrics import combine_evaluations, evaluate

    data = scenario.data

    def evaluate_scenario(
        params_D: Array | None, parts: Sequence[Predictions] | Sequence[ClientEvaluation]
    ) -> Evaluation | None:
        client_evaluations = [part for part in parts if isinstance(part, ClientEvaluation)]
        if client_evaluations:
            return combine_evaluations(client_evaluations, task=data.task)
        predictions = [part for part in parts if isinstance(part, Predictions)]
        pooled = None
        if data.pooled_test is not None and params_D is not None:
            test = data.pooled_test()
            pooled = Predictions(client=-1, outputs=scenario.trainer.predict(params_D, test.x), targets=test.y)
        if not predictions and pooled is None:
            return None
        evaluation = evaluate(predictions, task=data.task, pooled=pooled)
        if scenario.backdoor_examples is None or params_D is None:
            return evaluation
        success = _attack_success(scenario, params_D, evaluation.clients, scenario.backdoor_examples)
        return replace(evaluation, pooled={**evaluation.pooled, "attack_success": success})

    return evaluate_scenario


def _attack_success(
    scenario: Scenario, params_D: Array, clients: Sequence[ClientId], add_trigger: Callable[[Examples], Examples]
) -> float:
    """Return the share of held-out examples with the trigger that the model assigns to the target of the backdoor.

    The result is NaN if there are no examples.
    """
    examples = [add_trigger(scenario.data.test(client)) for client in clients]
    if not examples:
        return float("nan")
    x, y = np.concatenate([part.x for part in examples]), np.concatenate([part.y for part in examples])
    outputs = scenario.trainer.predict(params_D, x)
    predicted = outputs.argmax(axis=1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
    return float(np.mean(predicted == y)) if len(y) else float("nan")
