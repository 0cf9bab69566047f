"""How a data set that lies in one place comes to lie at clients: few lines each, or flwr-datasets.

Shapes: N examples, K clients.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.core.random import Purpose, generator, integer_seed
from fedlearn.errors import MissingExtra, SettingError, did_you_mean, is_count, is_number, require

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

KINDS = ("natural", "iid", "dirichlet", "dirichlet_equal", "pathological", "shards", "quantity", "feature", "time")
NEEDS_CLASSES = ("dirichlet", "dirichlet_equal", "pathological", "shards")


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Set the way in which rows are divided among clients.

    Args:
        kind: ``natural`` (by who collected the data), ``iid`` (shuffled, equal sizes), ``dirichlet`` (each class is
            divided in Dirichlet(alpha) shares), ``dirichlet_equal`` (equal sizes, each client's classes in
            Dirichlet(alpha) shares), ``pathological`` (each client has a few classes only), ``shards`` (the examples in
            order of class, cut into shards, a few for each client), ``quantity`` (shuffled, sizes in Dirichlet(alpha)
            shares), ``feature`` (by the size of one feature) or ``time`` (one period after another).
        num_clients: >= 1; for ``natural`` it must be what the data say.
        alpha: of ``dirichlet``, ``dirichlet_equal`` and ``quantity``, > 0; small means skewed, 100 is nearly ``iid``.
        classes_per_client: of ``pathological``, in 1..number of classes; of ``shards``, shards for each client.
        seed: of the random choices.
        strictness: of ``feature``, in [0, 1]: 0 is ``iid``, 1 the feature alone.

    Reference: Yurochkin et al., *Bayesian Nonparametric Federated Learning of Neural Networks*, ICML 2019,
    arXiv:1905.12022 (dirichlet); Hsu, Qi, Brown, *Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification*, 2019, arXiv:1909.06335 (dirichlet_equal); McMahan et al., AISTATS 2017,
    arXiv:1602.05629 (shards, pathological); Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An
    Experimental Study*, ICDE 2022, arXiv:2102.02079 (quantity).

    >>> print(Partition(kind="dirichlet", num_clients=20, alpha=0.3))
    dirichlet(0.3)
    """

    kind: str
    num_clients: int
    alpha: float = 0.5
    classes_per_client: int = 2
    seed: int = 1
    strictness: float = 0.8

    def __post_init__(self) -> None:
        guess = did_you_mean(str(self.kind), KINDS) or "iid"
        require(self.kind in KINDS, "partition", self.kind, f"one of {', '.join(KINDS)}", f"partition={guess}")
        counts = is_count(self.num_clients)
        require(counts, "num_clients", self.num_clients, "a whole number >= 1", "num_clients=10")
        positive = is_number(self.alpha, at_least=0) and self.alpha > 0
        require(positive, "alpha", self.alpha, "a number > 0", "alpha=0.5   (smaller is more skewed)")
        share = is_number(self.strictness, at_least=0) and self.strictness <= 1
        require(share, "strictness", self.strictness, "a number in [0, 1]", "strictness=0.8")

    def __str__(self) -> str:
        detail = dict.fromkeys(("dirichlet", "dirichlet_equal", "quantity"), f"({self.alpha:g})")
        detail |= dict.fromkeys(("pathological", "shards"), f"({self.classes_per_client})")
        return self.kind + (detail | {"feature": f"({self.strictness:g})"}).get(self.kind, "")


def partition_rows(
    partition: Partition,
    labels_N: np.ndarray,
    natural_N: np.ndarray | None = None,
    *,
    order_N: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return the row numbers of each client.

    Args:
        partition: the way.
        labels_N: class numbers (integers), or real targets, which only the kinds without classes can divide.
        natural_N: who each row belongs to (integers from 0), where the data know.
        order_N: by what ``feature`` and ``time`` order the rows, finite numbers.

    Raises:
        SettingError: the data cannot be divided that way.
        MissingExtra: flwr-datasets is needed and absent.

    *Guarantees*: no row is at two clients; every row is at one, save classes that ``pathological`` gives to nobody, of
    which a warning tells. Equal arguments give equal rows on every machine.

    >>> [rows.tolist() for rows in partition_rows(
    ...     Partition(kind="natural", num_clients=2), np.zeros(3), natural_N=np.array([1, 0, 1]))]
    [[1], [0, 2]]
    """
    if partition.kind == "natural":
        return _natural(partition, natural_N)
    num_examples = len(labels_N)
    expected = f"at most {num_examples}, one for each example"
    require(partition.num_clients <= num_examples, "num_clients", partition.num_clients, expected, "num_clients=10")
    classes = partition.kind not in NEEDS_CLASSES or np.issubdtype(labels_N.dtype, np.integer)
    expected = "natural, iid, quantity, feature or time, because the targets are not classes"
    require(classes, "partition", partition.kind, expected, "partition=iid")
    if partition.kind in ("feature", "time"):
        return _ordered(partition, order_N)
    if partition.kind in ("iid", "quantity"):
        shuffled_N = generator(partition.seed, Purpose.PARTITION).permutation(num_examples)
        sizes = _sizes(partition, num_examples) if partition.kind == "quantity" else partition.num_clients
        return list(np.array_split(shuffled_N, sizes))
    by_class = {
        "dirichlet": _dirichlet,
        "dirichlet_equal": _dirichlet_equal,
        "pathological": _pathological,
        "shards": _shards,
    }
    return by_class[partition.kind](partition, labels_N)


def add_feature_noise(x: np.ndarray, rows_K: Sequence[np.ndarray], *, level: float, seed: int) -> np.ndarray:
    """Return features with measurement noise: client k gets noise of variance ``level (k + 1) / K``.

    Args:
        x: ``(N, ...)``, not changed.
        rows_K: of each client, from `partition_rows`.
        level: the variance at the last client, >= 0.
        seed: of the noise.

    Reference: Li et al., ICDE 2022, arXiv:2102.02079 (noise-based feature imbalance).
    """
    require(is_number(level, at_least=0), "feature_noise", level, "a variance >= 0", "feature_noise=0.1")
    if not level:
        return x
    noisy = x.astype(np.float32)
    for client, rows in enumerate(rows_K):
        deviation = (level * (client + 1) / len(rows_K)) ** 0.5
        drawn = generator(seed, Purpose.FEATURE_NOISE, client=client).standard_normal(x[rows].shape)
        noisy[rows] += deviation * drawn
    return noisy


def _natural(how: Partition, natural_N: np.ndarray | None) -> list[np.ndarray]:
    if natural_N is None:
        expected = "iid, dirichlet, ...: these data do not say who they came from"
        raise SettingError("partition", "natural", expected, "partition=iid")
    num_natural = int(natural_N.max()) + 1
    expected = f"{num_natural}, the number that these data came from"
    fix = f"num_clients={num_natural}   (or scenario.partition=iid)"
    require(how.num_clients == num_natural, "num_clients", how.num_clients, expected, fix)
    return [np.flatnonzero(natural_N == client) for client in range(num_natural)]


def _sizes(how: Partition, num_examples: int) -> np.ndarray:
    """Where to cut: one example for each client, two if there are so many, the others in Dirichlet(alpha) shares."""
    at_least = min(2, num_examples // how.num_clients)
    shares_K = generator(how.seed, Purpose.PARTITION, client=1).dirichlet(np.full(how.num_clients, float(how.alpha)))
    ends = np.cumsum(shares_K) / shares_K.sum() * (num_examples - at_least * how.num_clients)
    return (np.rint(ends).astype(np.int64) + at_least * np.arange(1, how.num_clients + 1))[:-1]


def _ordered(how: Partition, order_N: np.ndarray | None) -> list[np.ndarray]:
    """Blocks of the rows in an order, which for ``feature`` is blended with a random one.

    Ranks, not values, are blended, so that one outlier does not make all others alike.
    """
    if order_N is None:
        expected = "iid, dirichlet, ...: these data do not say by what to order them"
        raise SettingError("partition", how.kind, expected, "partition=iid")
    ranks_N = np.empty(len(order_N))
    ranks_N[np.argsort(order_N, kind="stable")] = np.arange(len(order_N))
    if how.kind == "feature":
        spread_N = (ranks_N - (len(order_N) - 1) / 2) / len(order_N) * 12**0.5  # of mean 0 and variance 1
        noise_N = generator(how.seed, Purpose.PARTITION).standard_normal(len(order_N))
        ranks_N = how.strictness * spread_N + (1 - how.strictness) * noise_N
    return list(np.array_split(np.argsort(ranks_N, kind="stable"), how.num_clients))


def _shards(how: Partition, labels_N: np.ndarray) -> list[np.ndarray]:
    shards = how.num_clients * how.classes_per_client if is_count(how.classes_per_client) else 0
    expected = f"a whole number >= 1, of which each of {how.num_clients} clients can have so many shards"
    fits = 0 < shards <= len(labels_N)
    require(fits, "classes_per_client", how.classes_per_client, expected, "classes_per_client=2")
    rng = generator(how.seed, Purpose.PARTITION)
    shuffled_N = rng.permutation(len(labels_N))
    by_class_N = shuffled_N[np.argsort(labels_N[shuffled_N], kind="stable")]
    cut, dealt = np.array_split(by_class_N, shards), rng.permutation(shards)
    return [np.concatenate([cut[shard] for shard in own]) for own in np.split(dealt, how.num_clients)]


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
        raise SettingError(
            "alpha", how.alpha, expected, "alpha=0.5   (or fewer clients, or partition=dirichlet_equal)"
        ) from error


def _dirichlet_equal(how: Partition, labels_N: np.ndarray) -> list[np.ndarray]:
    partitioner = _flwr_partitioners(how).InnerDirichletPartitioner(
        partition_sizes=[len(rows) for rows in np.array_split(labels_N, how.num_clients)],
        partition_by="label",
        alpha=float(how.alpha),
        shuffle=True,
        seed=integer_seed(how.seed, Purpose.PARTITION),
    )
    classes_N = np.unique(labels_N, return_inverse=True)[1]  # numbered without gaps, as it wants them
    try:
        return _load(partitioner, classes_N, how.num_clients)
    except ValueError as error:
        expected = f"large enough that each of {how.num_clients} clients finds classes with examples left"
        raise SettingError("alpha", how.alpha, expected, "alpha=0.5") from error


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
