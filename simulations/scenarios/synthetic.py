"""The scenario `synthetic`: classify generated data whose clients differ in model and inputs, as in FedProx and q-FFL.

Shapes: N examples of a client, F = 60 features, O = 10 classes, K clients.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.random import Purpose, generator
from fedlearn.data.column_types import Number
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.partition import Partition, natural_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.errors import is_count, is_number, require
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.models import build_trainer, network_of

NUM_FEATURES, NUM_CLASSES = 60, 10
SHAPE: dict[str, Any] = {"input_shape": (NUM_FEATURES,), "hidden": (32,)}
PREPROCESSING = Preprocessing(
    inputs=TableInputs(columns=tuple(Number(name=f"feature_{number}") for number in range(NUM_FEATURES))),
    target=Target(name="class", task="multiclass", classes=tuple(map(str, range(NUM_CLASSES)))),
)
NETWORK = network_of(**SHAPE)


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def synthetic(
    *,
    model_spread: float = 1.0,
    input_spread: float = 1.0,
    num_generated: int = 100,
    framework: str = "torch",
    model: Any = "linear",
    partition: Partition | str = "natural",
    seed: int = 1,
    device: str = "cpu",
) -> Scenario:
    """Classify generated data: Synthetic(alpha, beta), with 60 features and ten classes.

    The labels of client k are ``argmax(W_k x + b_k)``. The entries of ``W_k`` and ``b_k`` have the mean ``u_k`` and the
    variance 1. Feature j has the mean ``v_kj`` and the variance ``j^-1.2``, where ``v_kj`` has the mean ``B_k`` and the
    variance 1. ``u_k`` and ``B_k`` have the mean 0. Clients have 50 examples, and a log-normal number of others.

    Args:
        model_spread: standard deviation of ``u_k``, >= 0 (alpha); larger values give clients more different models.
        input_spread: standard deviation of ``B_k``, >= 0 (beta); larger values give clients more different inputs.
        num_generated: number of clients, >= 1.
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``linear`` (60-10), ``mlp``, or a module with ten outputs.
        partition: ``natural``; default: test share 0.1.
        seed: seed of the data and of the test split.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.

    Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, *Federated Optimization in Heterogeneous Networks*, MLSys
    2020, arXiv:1812.06127.
    """
    partition = natural_partition("synthetic", partition, test_share=0.1)
    require(
        is_number(model_spread, at_least=0), "model_spread", model_spread, "a number >= 0", "scenario.model_spread=1"
    )
    require(
        is_number(input_spread, at_least=0), "input_spread", input_spread, "a number >= 0", "scenario.input_spread=1"
    )
    expected = "a whole number >= 1"
    require(is_count(num_generated), "num_generated", num_generated, expected, "scenario.num_generated=100")
    data = _generate(model_spread, input_spread, num_generated, test_share=partition.held_out_share, seed=seed)
    fitted, line = build_trainer(model, data, framework=framework, device=device, **SHAPE)
    return Scenario(
        name="synthetic",
        data=data,
        trainer=fitted,
        model=line,
        partition=f"synthetic({model_spread:g}, {input_spread:g})",
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )


def _generate(
    model_spread: float, input_spread: float, num_clients: int, *, test_share: float, seed: int
) -> FederatedData:
    rng = generator(seed, Purpose.PARTITION)
    sizes_K = rng.lognormal(4, 2, num_clients).astype(np.int64) + 50
    model_mean_K, feature_mean_K = rng.normal(0, model_spread, num_clients), rng.normal(0, input_spread, num_clients)
    clients = [
        _client_examples(generator(seed, Purpose.PARTITION, client=client + 1), int(size), u, v)
        for client, (size, u, v) in enumerate(zip(sizes_K, model_mean_K, feature_mean_K, strict=True))
    ]
    x = np.concatenate([x for x, _ in clients]).astype(np.float32)
    y = np.concatenate([y for _, y in clients])
    owner = np.repeat(np.arange(num_clients), sizes_K)
    return from_arrays(x, y, assignment=owner, task="multiclass", test_share=test_share, seed=seed)


def _client_examples(
    rng: np.random.Generator, num_examples: int, model_mean: float, feature_mean: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels of a client."""
    mean_F = rng.normal(feature_mean, 1, NUM_FEATURES)
    deviation_F = np.arange(1, NUM_FEATURES + 1) ** -0.6  # the square root of the variance
    weights_FO = rng.normal(model_mean, 1, (NUM_FEATURES, NUM_CLASSES))
    bias_O = rng.normal(model_mean, 1, NUM_CLASSES)
    x_NF = mean_F + deviation_F * rng.standard_normal((num_examples, NUM_FEATURES))
    return x_NF, (x_NF @ weights_FO + bias_O).argmax(axis=1)
