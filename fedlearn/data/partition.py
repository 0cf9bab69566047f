"""How a data set that lies in one place comes to lie at clients: an adapter over flwr-datasets.

Shapes: N examples.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.errors import MissingExtra, SettingError, did_you_mean, is_count, is_number, require
from fedlearn.seeds import Purpose, generator, integer_seed

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

KINDS = ("natural", "iid", "dirichlet", "pathological")


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A way to lay rows at clients.

    Args:
        kind: ``natural`` (by who collected the data), ``iid`` (shuffled, equal sizes), ``dirichlet`` (each class is
            divided in Dirichlet(alpha) shares) or ``pathological`` (each client has a few classes only).
        num_clients: >= 1; for ``natural`` it must be what the data say.
        alpha: of ``dirichlet``, > 0; small means skewed, 100 is nearly ``iid``.
        classes_per_client: of ``pathological``, in 1..number of classes.
        seed: of the random choices.

    Reference: Hsu, Qi, Brown, *Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification*, 2019, arXiv:1909.06335 (dirichlet); McMahan et al., AISTATS 2017, arXiv:1602.05629 (pathological).

    >>> print(Partition(kind="dirichlet", num_clients=20, alpha=0.3))
    dirichlet(0.3)
    """

    kind: str
    num_clients: int
    alpha: float = 0.5
    classes_per_client: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        guess = did_you_mean(str(self.kind), KINDS) or "iid"
        require(self.kind in KINDS, "partition", self.kind, f"one of {', '.join(KINDS)}", f"partition={guess}")
        counts = is_count(self.num_clients)
        require(counts, "num_clients", self.num_clients, "a whole number >= 1", "num_clients=10")
        positive = is_number(self.alpha, at_least=0) and self.alpha > 0
        require(positive, "alpha", self.alpha, "a number > 0", "alpha=0.5   (smaller is more skewed)")

    def __str__(self) -> str:
        detail = {"dirichlet": f"({self.alpha:g})", "pathological": f"({self.classes_per_client})"}
        return self.kind + detail.get(self.kind, "")


def partition_rows(how: Partition, labels_N: np.ndarray, natural_N: np.ndarray | None = None) -> list[np.ndarray]:
    """The row numbers of each client.

    Args:
        how: the way.
        labels_N: class numbers (integers), or real targets, which only ``natural`` and ``iid`` can divide.
        natural_N: who each row belongs to (integers from 0), where the data know.

    Raises:
        SettingError: the data cannot be divided that way.
        MissingExtra: flwr-datasets is needed and absent.

    *Guarantees*: no row is at two clients; every row is at one, save classes that ``pathological`` gives to nobody, of
    which a warning tells.

    >>> [rows.tolist() for rows in partition_rows(
    ...     Partition(kind="natural", num_clients=2), np.zeros(3), natural_N=np.array([1, 0, 1]))]
    [[1], [0, 2]]
    """
    if how.kind == "natural":
        return _natural(how, natural_N)
    num_examples = len(labels_N)
    expected = f"at most {num_examples}, one for each example"
    require(how.num_clients <= num_examples, "num_clients", how.num_clients, expected, "num_clients=10")
    if how.kind == "iid":
        shuffled_N = generator(how.seed, Purpose.PARTITION).permutation(num_examples)
        return list(np.array_split(shuffled_N, how.num_clients))
    classes = np.issubdtype(labels_N.dtype, np.integer)
    require(classes, "partition", how.kind, "natural or iid, because the targets are not classes", "partition=iid")
    return _dirichlet(how, labels_N) if how.kind == "dirichlet" else _pathological(how, labels_N)


def _natural(how: Partition, natural_N: np.ndarray | None) -> list[np.ndarray]:
    if natural_N is None:
        expected = "iid, dirichlet or pathological: these data do not say who they came from"
        raise SettingError("partition", "natural", expected, "partition=iid")
    num_natural = int(natural_N.max()) + 1
    expected = f"{num_natural}, the number that these data came from"
    fix = f"num_clients={num_natural}   (or scenario.partition=iid)"
    require(how.num_clients == num_natural, "num_clients", how.num_clients, expected, fix)
    return [np.flatnonzero(natural_N == client) for client in range(num_natural)]


def _dirichlet(how: Partition, labels_N: np.ndarray) -> list[np.ndarray]:
    partitioners = _flwr_partitioners(how)
    at_least = min(2, len(labels_N) // how.num_clients)  # one example to train on, one to hold out
    partitioner = partitioners.DirichletPartitioner(
        num_partitions=how.num_clients,
        partition_by="label",
        alpha=float(how.alpha),
        min_partition_size=at_least,
        self_balancing=False,
        shuffle=True,
        seed=integer_seed(how.seed, Purpose.PARTITION),
    )
    try:
        return _load(partitioner, labels_N, how.num_clients)
    except ValueError as error:
        expected = f"large enough that each of {how.num_clients} clients gets {at_least} examples or more"
        raise SettingError("alpha", how.alpha, expected, "alpha=0.5   (or fewer clients)") from error


def _pathological(how: Partition, labels_N: np.ndarray) -> list[np.ndarray]:
    num_classes = len(np.unique(labels_N))
    fits = is_count(how.classes_per_client) and how.classes_per_client <= num_classes
    expected = f"a whole number in 1..{num_classes}, the number of classes"
    require(fits, "classes_per_client", how.classes_per_client, expected, f"classes_per_client={min(2, num_classes)}")
    partitioner = _flwr_partitioners(how).PathologicalPartitioner(
        num_partitions=how.num_clients,
        partition_by="label",
        num_classes_per_partition=how.classes_per_client,
        class_assignment_mode="first-deterministic",  # every class is used once there are as many clients as classes
        shuffle=True,
        seed=integer_seed(how.seed, Purpose.PARTITION),
    )
    try:
        rows = _load(partitioner, labels_N, how.num_clients)
    except ValueError as error:
        expected = "few enough that each class has an example for each client it is given to"
        raise SettingError("num_clients", how.num_clients, expected, "num_clients=10") from error
    unused = len(labels_N) - sum(map(len, rows))
    if unused:
        missing = sorted(set(labels_N.tolist()) - set(labels_N[np.concatenate(rows)].tolist()))
        warnings.warn(f"partition={how.kind} leaves classes {missing} ({unused} examples) at no client", stacklevel=3)
    return rows


def _flwr_partitioners(how: Partition) -> Any:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        from flwr_datasets import partitioner
    except ImportError as error:
        raise MissingExtra(f"partition={how.kind}", "data") from error
    return partitioner


def _load(partitioner: Partitioner, labels_N: np.ndarray, num_clients: int) -> list[np.ndarray]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"row": np.arange(len(labels_N)), "label": labels_N})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its retries; what matters is said above
        return [np.asarray(partitioner.load_partition(client)["row"][:], np.int64) for client in range(num_clients)]
