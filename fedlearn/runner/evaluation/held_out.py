"""Predict the held-out examples with the final model of a run.

Shapes: N examples, T positions of a sequence, C outputs, K clients, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import ClientId, Examples, ServerState
from fedlearn.errors import FedlearnError
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.evaluation_round import select_evaluation_clients
from fedlearn.loop.local_training import personal_model
from fedlearn.runner.experiment import Experiment

Predict = Callable[[np.ndarray], np.ndarray]


class NotEvaluated(FedlearnError):
    """The final model has no evaluation; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out examples of clients, and the outputs of the final model. Positions of sequences are examples.

    Attributes:
        x: model inputs, one row for each unit.
        outputs_NC: outputs of the model.
        targets_N: targets.
        client_N: position in ``clients`` of the client of each example, ascending.
        unit_N: unit of each example, ascending from 0. A unit is a sequence, or the example itself.
        clients: ids of the clients with held-out examples; empty for a test set of the scenario.
        source: description of the examples.
        predict: function from inputs in the order of ``x`` to outputs.
    """

    x: np.ndarray
    outputs_NC: np.ndarray
    targets_N: np.ndarray
    client_N: np.ndarray
    unit_N: np.ndarray
    clients: tuple[ClientId, ...]
    source: str
    predict: Predict

    @property
    def are_sequences(self) -> bool:
        """True if several examples belong to one input."""
        return len(self.x) != len(self.targets_N)

    def subset(self, chosen_N: np.ndarray) -> HeldOut:
        """Return the examples for which ``chosen_N`` is true. Clients without such examples are absent."""
        present_K, client_N = np.unique(self.client_N[chosen_N], return_inverse=True)
        return replace(
            self,
            x=self.x[chosen_N],
            outputs_NC=self.outputs_NC[chosen_N],
            targets_N=self.targets_N[chosen_N],
            client_N=client_N,
            unit_N=np.arange(len(client_N)),
            clients=tuple(self.clients[k] for k in present_K) if self.clients else (),
        )


def predict_held_out(experiment: Experiment, state: ServerState) -> HeldOut:
    """Return the held-out examples that the run evaluates, and the outputs of the model after the last round.

    Raises:
        NotEvaluated: the examples are at the nodes, there are none, or an output is not finite.
    """
    data, rule = experiment.scenario.data, experiment.plan.strategy.local
    if data.num_train is not None:
        raise NotEvaluated("held-out examples and outputs stay at the nodes; only sums of metrics leave a node")
    parts: list[Examples] = []
    clients: list[ClientId] = []
    if data.pooled_test is not None and not rule.personal_parameters:
        parts, source = [data.pooled_test()], "test set of the scenario"
    else:
        source = "held-out examples of the clients"
        for client in select_evaluation_clients(data.clients, experiment.plan.schedule, experiment.plan.seed):
            if len(part := data.test(client)):
                parts.append(part)
                clients.append(client)
    if not any(map(len, parts)):
        raise NotEvaluated("there are no held-out examples")
    predict = _predictor(experiment, state, clients, [len(part) for part in parts])
    is_sequence = data.task.positions_are_examples
    return _held_out(parts, tuple(clients), source, predict, is_sequence=is_sequence)


def _predictor(
    experiment: Experiment, state: ServerState, clients: Sequence[ClientId], sizes: Sequence[int]
) -> Predict:
    """Return the prediction by the global model, or by the model of each client if there is no global model."""
    trainer, strategy = experiment.scenario.trainer, experiment.plan.strategy
    params_D, engine = as_numpy(state.params_D), experiment.engine
    if not strategy.local.personal_parameters:
        return lambda x: trainer.predict(params_D, x)
    initial = initial_client_state(strategy, engine.layout, params_D)
    states = [engine.client_states.get(client, initial) for client in clients]
    models = [personal_model(strategy.local, engine.layout, params_D, each) for each in states]

    def predict(x: np.ndarray) -> np.ndarray:
        parts = np.split(x, np.cumsum(sizes)[:-1])
        return np.concatenate([trainer.predict(model, part) for model, part in zip(models, parts, strict=True)])

    return predict


def _held_out(
    parts: Sequence[Examples], clients: tuple[ClientId, ...], source: str, predict: Predict, *, is_sequence: bool
) -> HeldOut:
    x = np.concatenate([part.x for part in parts])
    targets = np.concatenate([np.asarray(part.y) for part in parts])
    outputs = np.asarray(predict(x), np.float64)
    client_U = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    unit_N = np.arange(len(targets))
    if is_sequence and targets.ndim == 2:  # a target below 0 is padding
        is_real_UT = targets >= 0
        unit_N, targets, outputs = np.nonzero(is_real_UT)[0], targets[is_real_UT], outputs[is_real_UT]
    if not len(targets):
        raise NotEvaluated("there are no held-out examples")
    if not np.isfinite(outputs).all():
        raise NotEvaluated("an output of the model is not finite")
    return HeldOut(
        x=x,
        outputs_NC=outputs,
        targets_N=targets,
        client_N=client_U[unit_N],
        unit_N=np.unique(unit_N, return_inverse=True)[1],
        clients=clients,
        source=source,
        predict=predict,
    )
