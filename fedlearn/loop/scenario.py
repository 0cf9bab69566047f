"""Describe a reproducible problem: data of clients, a model, and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import Array, ClientEvaluation, ClientId, Evaluation, Examples, Predictions
from fedlearn.data.data_check.records import DataCheck
from fedlearn.data.held_out_columns import HeldOutColumns
from fedlearn.data.preprocessing import Preprocessing
from fedlearn.loop.evaluation_round import Evaluate
from fedlearn.loop.protocols import Trainer


@dataclass(frozen=True, kw_only=True)
class Network:
    """Name the builder of a model and its arguments, to build the model again without data.

    Args:
        builder: dotted name of a function ``(model, data, *, framework, device, **arguments)``, which returns a trainer
            and a text. It reads the task and the number of classes from ``data``.
        arguments: other arguments of the builder, as JSON values.
    """

    builder: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


# function from the settings of a scenario to its preprocessing and network; None if the settings do not determine them
DeclaredModel = Callable[[Mapping[str, Any]], tuple[Preprocessing, Network] | None]
Builder = TypeVar("Builder", bound=Callable[..., Any])


def declares_model(declared: DeclaredModel) -> Callable[[Builder], Builder]:
    """Return a decorator that states the model of a scenario builder without data.

    The coordinator of a deployed run has no data. It saves this description with the trained model.
    """

    def state(builder: Builder) -> Builder:
        vars(builder).update(declared_model=declared)
        return builder

    return state


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Describe the problem of an experiment: data, trainer and metrics, without the algorithm.

    Args:
        name: short name, part of the name of the run folder.
        data: examples of each client.
        trainer: the model in its framework.
        model: description of the model for the header, e.g. ``mlp 13-32-1``; default empty.
        metric: main metric of tables and figures; default the metric of the task .
        partition: partition of the data over the clients, e.g. ``natural`` (default) or ``dirichlet(0.3)``.
        disclosure: information about clients that the preparation of the data disclosed; default empty.
        ledger: privacy loss of this disclosure, if noise protects each record; default empty.
        backdoor_examples: changes held-out examples to the trigger and the target of an attack; None for no backdoor.
        preprocessing: inputs and target of the model. A run saves it, so that predictions need no training data. None
            for a scenario without a description; its model then predicts for arrays of model inputs only.
        network: builder of the model. A run saves it, so that predictions need no training data; None if unknown.
        base_digest: SHA-256 of the files of the pretrained model whose frozen parameters clients do not send; default
            empty. Nodes with different digests do not train together.
        data_digests: digest of each part of the raw data by name, e.g. the name of a column and a file. A resumed run
            compares them. Empty compares the examples of each client.
        held_out_table: CSV with client, file and rows of all held-out rows; empty if the scenario does not know them.
        held_out_columns: columns of the raw held-out rows, which define groups of examples. None computes the cells
            back from the model inputs.
        data_check: summary of the columns and flags for probable faults. A simulation saves and shows it. None without
            a check, and at a real node.
    """

    name: str
    data: FederatedData
    trainer: Trainer
    model: str = ""
    metric: str | None = None
    partition: str = "natural"
    disclosure: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    backdoor_examples: Callable[[Examples], Examples] | None = None
    preprocessing: Preprocessing | None = None
    network: Network | None = None
    base_digest: str = ""
    data_digests: Mapping[str, str] = field(default_factory=dict)
    held_out_table: str = ""
    held_out_columns: HeldOutColumns | None = None
    data_check: DataCheck | None = None

    @staticmethod
    def from_datasets(datasets: Mapping[str, Any], *, model: Any, **options: Any) -> Scenario:
        """Return a scenario of data sets and a module of the user.

        Each client is read when a round needs it, and 64 clients stay in memory.

        Args:
            datasets: name of a client -> data set. Pairs of arrays, data frames, and data sets of PyTorch or Hugging
                Face are data sets. A function without arguments may return the data set.
            model: ``nn.Module`` of PyTorch, module of flax.linen, flax.nnx or equinox, pair of functions ``(init,
                apply)`` of JAX, or a trainer. A module keeps its weights.
            options: ``task`` (default ``multiclass``); ``loss``, ``forward`` and ``output``, see
                `fedlearn.TorchTrainer` and `fedlearn.JaxTrainer`; ``metrics`` in addition
                to the metrics of the task; ``metric``, the main metric; ``target`` and ``features``, names of columns;
                ``classes``, names of classes in order, if targets are not class numbers; ``num_classes``, which avoids
                that all clients are read for a count; ``collate``, function from a list of items to arrays of inputs
                and targets; ``test``, held-out data sets by name; ``test_share`` (default 0.25), the share that each
                client holds out without ``test``; ``name``; ``device``; ``seed`` of the split.

        Raises:
            SettingError: an option or the model is wrong.
            DataError: a data set cannot be read.
        """
        module = import_module("fedlearn.trainers.module_scenario")  # an import statement would go up the layers
        scenario: Scenario = module.scenario_from_datasets(datasets, model=model, **options)
        return scenario


def judge(scenario: Scenario) -> Evaluate:
    """Return the evaluation function of a scenario, for `federate`.

    It computes the metrics of the task for each client and for all examples pooled. The examples for the pooled metrics
    come from one of these sources:

    - the test set of the scenario, if it has one and clients use the global model;
    - the held-out examples of all evaluated clients, otherwise;
    - the metric sums of the clients, if clients send a `ClientEvaluation` in place of outputs.

    If no client has held-out examples, the test set of the scenario alone evaluates the global model. Metrics such as
    ``rmse`` are in the unit of the target. Clients that never train are evaluated apart, in ``Evaluation.held_out``.
    """
    from fedlearn.core.metrics import combine_evaluations, evaluate

    data = scenario.data

    def evaluate_scenario(
        params_D: Array | None, parts: Sequence[Predictions] | Sequence[ClientEvaluation]
    ) -> Evaluation | None:
        client_evaluations = [part for part in parts if isinstance(part, ClientEvaluation)]
        if client_evaluations:
            return in_target_unit(combine_evaluations(client_evaluations, task=data.task), scenario)
        predictions = [part for part in parts if isinstance(part, Predictions)]
        pooled = None
        if data.pooled_test is not None and params_D is not None:
            test = data.pooled_test()
            pooled = Predictions(client=-1, outputs=scenario.trainer.predict(params_D, test.x), targets=test.y)
        if not predictions and pooled is None:
            return None
        evaluation = in_target_unit(evaluate(predictions, task=data.task, pooled=pooled), scenario)
        if data.held_out_clients and params_D is not None:
            evaluation = replace(evaluation, held_out=_at_held_out_clients(scenario, params_D))
        if scenario.backdoor_examples is None or params_D is None:
            return evaluation
        success = _attack_success(scenario, params_D, evaluation.clients, scenario.backdoor_examples)
        return replace(evaluation, pooled={**evaluation.pooled, "attack_success": success})

    return evaluate_scenario


def _at_held_out_clients(scenario: Scenario, params_D: Array) -> Evaluation:
    """Return the evaluation of the global model at the clients that never train."""
    from fedlearn.core.metrics import evaluate

    predictions = []
    for client in scenario.data.held_out_clients:
        test = scenario.data.test(client)
        outputs = scenario.trainer.predict(params_D, test.x)
        predictions.append(Predictions(client=client, outputs=outputs, targets=test.y))
    return in_target_unit(evaluate(predictions, task=scenario.data.task), scenario)


def in_target_unit(evaluation: Evaluation, scenario: Scenario) -> Evaluation:
    """Return the evaluation with errors in the unit of the target. The training scales the target."""
    target = scenario.preprocessing.target if scenario.preprocessing else None
    spread = abs(target.spread) if target is not None and not target.classes else 1.0
    if spread == 1:
        return evaluation
    unit_metrics = scenario.data.task.unit_metrics
    factor = {name: spread if name in unit_metrics else 1.0 for name in evaluation.pooled}
    return replace(
        evaluation,
        pooled={name: value * factor[name] for name, value in evaluation.pooled.items()},
        per_client={name: values_K * factor.get(name, 1.0) for name, values_K in evaluation.per_client.items()},
    )


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
