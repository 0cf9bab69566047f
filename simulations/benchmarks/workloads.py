"""Workloads, with one definition for all systems.

- w1 is a small network; it shows the overhead of a framework.
- w2 is the EMNIST network of LEAF and FedJAX; arithmetic dominates its time.
- w3 is cross-device learning: many clients with little work each.
- w4 is w1 with DP-SGD on the clients.
- w5 is the CIFAR-10 benchmark of pfl-research.

References: Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097; Ro, Suresh, Wu, *FedJAX:
Federated learning simulation with JAX*, 2021, arXiv:2108.02117; Granqvist et al., *pfl-research: simulation framework
for accelerating research in Private Federated Learning*, NeurIPS 2024, arXiv:2404.06430.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

import numpy as np

from fedlearn import LocalSettings, SettingError
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ExampleDP
from fedlearn.errors import did_you_mean
from fedlearn.extend import is_count, require

SEED = 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A workload: model, data, cohort and local training. Clients train one epoch of SGD with learning rate 0.1.

    Args:
        name: name as typed, e.g. ``w1``.
        title: title in tables.
        model: ``mlp``, ``linear`` or ``cnn``, in `simulations.benchmarks.models_torch` and ``models_jax``.
        task: ``binary`` or ``multiclass``.
        num_classes: number of classes, >= 2.
        input_shape: shape of one example; images are height x width x channels.
        num_clients: number of clients, >= 1.
        cohort_size: clients per round, drawn uniformly.
        examples_per_client: mean number of examples of a client.
        batch_size: examples per local step.
        rounds: default number of rounds.
        spread: standard deviation of the logarithm of the number of examples of a client; 0 makes all equal.
        dropout: True adds dropout to the model (0.25 before its hidden layer, 0.5 after it).
        example_dp: settings of DP-SGD on the clients, with Poisson batches of ``batch_size`` examples on average.
        device: device of fedlearn's trainer, default ``cpu``.
    """

    name: str
    title: str
    model: str
    task: str
    num_classes: int
    input_shape: tuple[int, ...]
    num_clients: int
    cohort_size: int
    examples_per_client: int
    batch_size: int
    rounds: int
    spread: float = 0.0
    dropout: bool = False
    example_dp: ExampleDP | None = None
    device: str = "cpu"

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the model: one for a binary task, else one per class."""
        return self.num_classes if self.task == "multiclass" else 1

    @property
    def local(self) -> LocalSettings:
        """Settings of local training at the clients."""
        return LocalSettings(epochs=1, batch_size=self.batch_size, learning_rate=0.1, example_dp=self.example_dp)

    def size(self, client: int) -> int:
        """Return the number of examples of a client.

        It is the mean, or with ``spread`` a lognormal number between a tenth and five times the mean.

        >>> workload("w1").size(7), workload("w2").size(7) == workload("w2").size(7)
        (600, True)
        """
        mean, spread = self.examples_per_client, self.spread
        if not spread:
            return mean
        size = generator(SEED, Purpose.PARTITION, client=client).lognormal(log(mean) - spread**2 / 2, spread)
        return int(np.clip(round(size), max(1, mean // 10), 5 * mean))

    @property
    def largest(self) -> int:
        """Maximum number of examples of a client."""
        return self.examples_per_client * (5 if self.spread else 1)

    def __str__(self) -> str:
        size = f"{'about ' if self.spread else ''}{self.examples_per_client} examples"
        return (
            f"{self.name}: {self.title}, {self.num_clients:,} clients of {size}, "
            f"cohort {self.cohort_size:,}, batch {self.batch_size}, 1 epoch"
        )


W1 = Workload(
    name="w1",
    title="MLP 784-128-64-10",
    model="mlp",
    task="multiclass",
    num_classes=10,
    input_shape=(784,),
    num_clients=100,
    cohort_size=10,
    examples_per_client=600,
    batch_size=32,
    rounds=20,
)
W2 = Workload(
    name="w2",
    title="EMNIST CNN (LEAF, FedJAX)",
    model="cnn",
    task="multiclass",
    num_classes=62,
    input_shape=(28, 28, 1),
    num_clients=1_000,
    cohort_size=50,
    examples_per_client=100,
    batch_size=20,
    rounds=5,
    spread=0.5,
    dropout=True,
)
W3 = Workload(
    name="w3",
    title="logistic regression, 1,000 features",
    model="linear",
    task="binary",
    num_classes=2,
    input_shape=(1000,),
    num_clients=10_000,
    cohort_size=1_000,
    examples_per_client=20,
    batch_size=10,
    rounds=10,
)
W5 = Workload(
    name="w5",
    title="CIFAR-10 CNN (pfl-research)",
    model="cnn",
    task="multiclass",
    num_classes=10,
    input_shape=(32, 32, 3),
    num_clients=1_000,
    cohort_size=50,
    examples_per_client=50,
    batch_size=10,
    rounds=5,
    dropout=True,
)
W4 = replace(W1, name="w4", title=f"{W1.title} with DP-SGD", example_dp=ExampleDP(clip=1.0, noise_multiplier=1.0))
WORKLOADS = {item.name: item for item in (W1, W2, W3, W4, W5)}
SIZES = {"clients": "num_clients", "cohort": "cohort_size", "examples": "examples_per_client", "rounds": "rounds"}


def workload(name: str, *, device: str = "cpu", **sizes: int | None) -> Workload:
    """Return a workload by name, with other sizes if ``sizes`` has them.

    Args:
        name: ``w1`` to ``w5``.
        device: device of fedlearn's trainer.
        sizes: ``clients``, ``cohort``, ``examples`` (mean per client) and ``rounds``, each >= 1; None keeps the
            number of the workload.

    Raises:
        SettingError: The workload is unknown, or a size is out of range.
    """
    if name not in WORKLOADS:
        guess = did_you_mean(name, WORKLOADS) or "w1"
        raise SettingError("workload", name, f"one of {', '.join(WORKLOADS)}", f"workload={guess}")
    for setting, size in sizes.items():
        require(size is None or is_count(size), setting, size, "a whole number >= 1", f"{setting}=10")
    changes = {SIZES[setting]: size for setting, size in sizes.items() if size is not None}
    chosen = replace(WORKLOADS[name], device=device, **changes)  # type: ignore[arg-type]
    most = chosen.num_clients
    fits = chosen.cohort_size <= most
    require(fits, "cohort", chosen.cohort_size, f"at most {most:,}, the number of clients", f"cohort={most}")
    return chosen
