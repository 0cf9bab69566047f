"""Define the kinds of partitions of a data set among clients.

Shapes: N examples, K clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlearn.core.random import Purpose, generator
from fedlearn.data import class_partitions
from fedlearn.data.partition_base import DEFAULTS, Partition, Rows
from fedlearn.errors import SettingError, is_count, is_number, require


@dataclass(frozen=True, kw_only=True)
class Natural(Partition):
    """Keep each row at the client that collected it.

    Args:
        num_clients: None, or the number of clients in the data.
        test_share: see `Partition`.
    """

    kind: ClassVar[str] = "natural"

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return the rows that each natural client collected.

        Raises:
            SettingError: the data have no natural clients, or another number of clients.
        """
        if rows.natural_N is None:
            expected = "iid, dirichlet, ...: these data have no natural clients"
            raise SettingError("partition", "natural", expected, "partition=iid")
        num_natural = int(rows.natural_N.max()) + 1
        self.require_num_clients(num_natural)
        return [np.flatnonzero(rows.natural_N == client) for client in range(num_natural)]

    def require_num_clients(self, num_natural: int) -> None:
        """Raise `SettingError` if the number of clients differs from the number in the data."""
        fits = self.num_clients in (None, num_natural)
        expected = f"null or {num_natural}, the number of clients in the data"
        fix = f"partition.num_clients={num_natural}"
        require(fits, "partition.num_clients", self.num_clients, expected, fix)


@dataclass(frozen=True, kw_only=True)
class Iid(Partition):
    """Shuffle the rows and divide them into equal parts. `Partition` describes the arguments."""

    kind: ClassVar[str] = "iid"

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return shuffled rows in equal parts."""
        shuffled_N = generator(seed, Purpose.PARTITION).permutation(len(rows))
        return np.array_split(shuffled_N, _count(self))


@dataclass(frozen=True, kw_only=True)
class _WithAlpha(Partition):
    """Share the setting ``alpha`` of partitions that draw from a Dirichlet distribution.

    Args:
        num_clients: see `Partition`.
        test_share: see `Partition`.
        alpha: concentration, > 0; smaller is more skewed, 100 is nearly iid; None takes the default of the scenario, or
            0.5.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        is_positive = self.alpha is None or (is_number(self.alpha, at_least=0) and self.alpha > 0)
        require(is_positive, "alpha", self.alpha, "a number > 0; smaller is more skewed", "alpha=0.5")

    @property
    def concentration(self) -> float:
        """Concentration of the distribution: ``alpha``, or its default."""
        return float(DEFAULTS["alpha"] if self.alpha is None else self.alpha)

    def __str__(self) -> str:
        return f"{self.kind}({self.concentration:g})"


@dataclass(frozen=True, kw_only=True)
class Dirichlet(_WithAlpha):
    """Divide each class in Dirichlet(alpha) shares.

    Args:
        num_clients: see `Partition`.
        test_share: see `Partition`.
        alpha: concentration, > 0; smaller is more skewed, 100 is nearly iid; None takes the default of the scenario, or
            0.5.
        self_balancing: whether a client with more than the mean number of examples gets no examples of later classes.
            Then sizes differ less, and clients have fewer classes.

    References:
        Yurochkin et al., *Bayesian Nonparametric Federated Learning of Neural Networks*, ICML 2019, arXiv:1905.12022;
        self-balancing: Li et al., *Federated Learning on Non-IID Data Silos*, ICDE 2022, arXiv:2102.02079.

    >>> print(Dirichlet(num_clients=20, alpha=0.3))
    dirichlet(0.3)
    """

    self_balancing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        is_flag = isinstance(self.self_balancing, bool)
        require(is_flag, "self_balancing", self.self_balancing, "true or false", "self_balancing=true")

    def __str__(self) -> str:
        return f"{super().__str__()}, self-balancing" if self.self_balancing else super().__str__()

    kind: ClassVar[str] = "dirichlet"
    needs_classes: ClassVar[bool] = True

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return rows with each class divided in Dirichlet shares."""
        return class_partitions.dirichlet(
            rows.labels_N,
            num_clients=_count(self),
            alpha=self.concentration,
            seed=seed,
            self_balancing=self.self_balancing,
        )


@dataclass(frozen=True, kw_only=True)
class DirichletEqual(_WithAlpha):
    """Give all clients equally many rows, with classes in Dirichlet(alpha) shares.

    References:
        Hsu, Qi, Brown, *Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification*,
        2019, arXiv:1909.06335.
    """

    kind: ClassVar[str] = "dirichlet_equal"
    needs_classes: ClassVar[bool] = True

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return equally many rows per client, with classes in Dirichlet shares."""
        return class_partitions.dirichlet_equal(
            rows.labels_N, num_clients=_count(self), alpha=self.concentration, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class Quantity(_WithAlpha):
    """Shuffle the rows and divide them into parts with Dirichlet(alpha) sizes.

    References:
        Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An Experimental Study*, ICDE 2022,
        arXiv:2102.02079.
    """

    kind: ClassVar[str] = "quantity"

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return shuffled rows in parts with Dirichlet sizes."""
        num_examples, num_clients = len(rows), _count(self)
        shuffled_N = generator(seed, Purpose.PARTITION).permutation(num_examples)
        # each client gets two examples if there are enough, else one; the shares divide the rest
        at_least = min(2, num_examples // num_clients)
        rng = generator(seed, Purpose.PARTITION, client=1)
        shares_K = rng.dirichlet(np.full(num_clients, self.concentration))
        ends_K = np.cumsum(shares_K) / shares_K.sum() * (num_examples - at_least * num_clients)
        cuts = (np.rint(ends_K).astype(np.int64) + at_least * np.arange(1, num_clients + 1))[:-1]
        return np.array_split(shuffled_N, cuts)


@dataclass(frozen=True, kw_only=True)
class _WithClassesPerClient(Partition):
    """Share the setting ``classes_per_client`` of partitions that give each client a few classes.

    Args:
        num_clients: see `Partition`.
        test_share: see `Partition`.
        classes_per_client: number of classes, >= 1; None takes the default of the scenario, or 2.
    """

    classes_per_client: int | None = None

    needs_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = self.classes_per_client is None or is_count(self.classes_per_client)
        require(is_valid, "classes_per_client", self.classes_per_client, "a whole number >= 1", "classes_per_client=2")

    @property
    def num_classes(self) -> int:
        """Number of classes per client: ``classes_per_client``, or its default."""
        return self.classes_per_client or int(DEFAULTS["classes_per_client"])

    def __str__(self) -> str:
        return f"{self.kind}({self.num_classes})"


@dataclass(frozen=True, kw_only=True)
class Pathological(_WithClassesPerClient):
    """Give each client examples of a few classes only. A warning names classes that remain at no client.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017,
        arXiv:1602.05629.
    """

    kind: ClassVar[str] = "pathological"
    covers_all_rows: ClassVar[bool] = False

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return rows of a few classes per client.

        Raises:
            SettingError: the data have fewer classes.
        """
        available, name = len(np.unique(rows.labels_N)), "partition.classes_per_client"
        expected = f"a whole number in 1..{available}, the number of classes"
        require(self.num_classes <= available, name, self.num_classes, expected, f"{name}={min(2, available)}")
        return class_partitions.pathological(
            rows.labels_N, num_clients=_count(self), classes_per_client=self.num_classes, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class Shards(_WithClassesPerClient):
    """Sort the examples by class, cut them into shards, and give each client ``classes_per_client`` shards.

    References:
        McMahan et al., AISTATS 2017, arXiv:1602.05629.
    """

    kind: ClassVar[str] = "shards"

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return a few shards of rows per client, sorted by class.

        Raises:
            SettingError: there are more shards than rows.
        """
        num_shards, name = _count(self) * self.num_classes, "partition.classes_per_client"
        expected = f"at most {len(rows) // _count(self)}, so that each shard has an example"
        require(num_shards <= len(rows), name, self.num_classes, expected, f"{name}=2")
        rng = generator(seed, Purpose.PARTITION)
        shuffled_N = rng.permutation(len(rows))
        by_class_N = shuffled_N[np.argsort(rows.labels_N[shuffled_N], kind="stable")]
        shards, permuted = np.array_split(by_class_N, num_shards), rng.permutation(num_shards)
        return [np.concatenate([shards[i] for i in shards_k]) for shards_k in np.split(permuted, _count(self))]


@dataclass(frozen=True, kw_only=True)
class Time(Partition):
    """Give each client the rows of one period. `Partition` describes the arguments."""

    kind: ClassVar[str] = "time"

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return the rows of one period per client.

        Raises:
            SettingError: the data have no order of rows.
        """
        return np.array_split(np.argsort(_ranks(self, rows.order_N), kind="stable"), _count(self))


@dataclass(frozen=True, kw_only=True)
class Feature(Partition):
    """Give each client the rows with similar values of one feature.

    Args:
        num_clients: see `Partition`.
        test_share: see `Partition`.
        strictness: number in [0, 1]; 0 is iid, 1 orders by the feature alone.
    """

    strictness: float = 0.8

    kind: ClassVar[str] = "feature"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = is_number(self.strictness, at_least=0) and self.strictness <= 1
        require(is_share, "strictness", self.strictness, "a number in [0, 1]", "strictness=0.8")

    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return rows with similar values of a feature per client.

        Raises:
            SettingError: the data have no order of rows.
        """
        ranks_N = _ranks(self, rows.order_N)  # ranks, because an outlier would make all other values alike
        num_examples = len(ranks_N)
        spread_N = (ranks_N - (num_examples - 1) / 2) / num_examples * 12**0.5  # mean 0, variance 1
        noise_N = generator(seed, Purpose.PARTITION).standard_normal(num_examples)
        blended_N = self.strictness * spread_N + (1 - self.strictness) * noise_N
        return np.array_split(np.argsort(blended_N, kind="stable"), _count(self))

    def __str__(self) -> str:
        return f"{self.kind}({self.strictness:g})"


def _count(partition: Partition) -> int:
    return int(partition.num_clients or DEFAULTS["num_clients"])


def _ranks(partition: Partition, order_N: np.ndarray | None) -> np.ndarray:
    if order_N is None:
        expected = "iid, dirichlet, ...: these data have no order of rows"
        raise SettingError("partition", partition, expected, "partition=iid")
    ranks_N = np.empty(len(order_N))
    ranks_N[np.argsort(order_N, kind="stable")] = np.arange(len(order_N))
    return ranks_N
