"""Divide a data set among clients: `partition_rows`, and `as_partition` for the settings of a scenario.

Shapes: N examples, K clients.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from fedlearn.core.random import Purpose, generator
from fedlearn.data.partition_base import DEFAULTS, Partition, Rows
from fedlearn.data.partition_kinds import (
    Dirichlet,
    DirichletEqual,
    Feature,
    Iid,
    Natural,
    Pathological,
    Quantity,
    Shards,
    Time,
)
from fedlearn.errors import SettingError, did_you_mean, is_number, require

PARTITIONS: Mapping[str, type[Partition]] = {
    kind.kind: kind for kind in (Natural, Iid, Dirichlet, DirichletEqual, Pathological, Shards, Quantity, Feature, Time)
}


def as_partition(partition: Partition | str, **defaults: Any) -> Partition:
    """Return a partition with the defaults of a scenario for all settings that are None.

    Args:
        partition: a `Partition`, or the name of a kind in `PARTITIONS`.
        defaults: values of the scenario, e.g. ``num_clients=20``; `DEFAULTS` has the others.

    Raises:
        SettingError: the name is unknown, or the object is not a `Partition`.

    >>> as_partition("dirichlet", num_clients=20)
    Dirichlet(num_clients=20, test_share=0.25, alpha=0.5, self_balancing=False)
    """
    if isinstance(partition, str):
        closest = did_you_mean(partition, PARTITIONS) or "iid"
        expected = f"one of {', '.join(PARTITIONS)}"
        require(partition in PARTITIONS, "partition", partition, expected, f"partition={closest}")
        partition = PARTITIONS[partition]()
    if not isinstance(partition, Partition):
        expected = "a name, or an object of a subclass of fedlearn.data.partition.Partition"
        raise SettingError("partition", partition, expected, "partition=iid")
    values = {**DEFAULTS, **defaults}
    if isinstance(partition, Natural):
        del values["num_clients"]  # the data determine it
    unset = [field.name for field in fields(partition) if field.init and getattr(partition, field.name) is None]
    return replace(partition, **{name: values[name] for name in unset if name in values})


def natural_partition(scenario: str, partition: Partition | str, **defaults: Any) -> Partition:
    """Return a natural partition with the defaults of a scenario with fixed clients.

    Args:
        scenario: name of the scenario, for messages.
        partition: see `as_partition`.
        defaults: see `as_partition`.

    Raises:
        SettingError: the partition is of another kind, or sets the number of clients.
    """
    natural = as_partition(partition, **defaults)
    expected = f"natural, because the clients of scenario={scenario} are fixed"
    require(isinstance(natural, Natural), "partition", natural, expected, "partition=natural")
    num_clients = natural.num_clients
    expected = f"null, because the clients of scenario={scenario} are fixed"
    require(num_clients is None, "partition.num_clients", num_clients, expected, "partition.num_clients=null")
    return natural


def partition_rows(
    partition: Partition,
    labels_N: np.ndarray,
    natural_N: np.ndarray | None = None,
    *,
    order_N: np.ndarray | None = None,
    seed: int = 1,
) -> list[np.ndarray]:
    """Return the row numbers of each client, after a check of the guarantees.

    Args:
        partition: result of `as_partition`.
        labels_N: class numbers (integers), or real targets for the kinds that need no classes.
        natural_N: number of the client that collected each row, from 0; None if unknown.
        order_N: finite numbers by which ``feature`` and ``time`` order the rows; None if there are none.
        seed: seed of all random choices.

    Raises:
        SettingError: the partition is not possible with these data, or breaks the guarantees.

    *Guarantees*: each row is at one client at most. Warnings name rows at no client and clients without rows. Equal
    arguments give equal rows on every machine.

    >>> [rows.tolist() for rows in partition_rows(Natural(), np.zeros(3), natural_N=np.array([1, 0, 1]))]
    [[1], [0, 2]]
    """
    num_examples, num_clients = len(labels_N), partition.num_clients
    expected = f"at most {num_examples}, the number of examples"
    fits = num_clients is None or num_clients <= num_examples
    require(fits, "partition.num_clients", num_clients, expected, "partition.num_clients=10")
    classes = not partition.needs_classes or np.issubdtype(labels_N.dtype, np.integer)
    expected = "natural, iid, quantity, feature or time, because the targets are not classes"
    require(classes, "partition", partition, expected, "partition=iid")
    rows = Rows(labels_N=labels_N, natural_N=natural_N, order_N=order_N)
    return _check_rows(partition, list(partition.client_rows(rows, seed)), labels_N)


def _check_rows(partition: Partition, rows: list[np.ndarray], labels_N: np.ndarray) -> list[np.ndarray]:
    """Check the guarantees of `partition_rows`; warn about unassigned rows and clients without rows."""
    num_examples, num_clients = len(labels_N), partition.num_clients
    rows = [np.asarray(rows_k) for rows_k in rows]
    are_integers = all(rows_k.ndim == 1 and (not rows_k.size or rows_k.dtype.kind in "iu") for rows_k in rows)
    rows = [rows_k.astype(np.int64, copy=False) for rows_k in rows] if are_integers else rows
    used_N = np.concatenate([np.zeros(0, np.int64), *rows]) if are_integers else np.zeros(0, np.int64)
    problems = {
        "an array of row numbers (integers) for each client": not are_integers,
        f"row numbers in 0..{num_examples - 1}": bool(((used_N < 0) | (used_N >= num_examples)).any()),
        "each row at one client at most": len(np.unique(used_N)) < len(used_N),
        f"rows of {num_clients} clients; it returned rows of {len(rows)}": num_clients not in (None, len(rows)),
    }
    for expected, is_broken in problems.items():
        require(not is_broken, "partition", partition, expected, "fedlearn.testing.check_partition(...)")
    if missing := num_examples - len(used_N):
        unused = sorted(set(labels_N.tolist()) - set(labels_N[used_N].tolist())) if labels_N.dtype.kind in "iu" else []
        unassigned = f"classes {unused} ({missing} examples)" if unused else f"{missing} examples"
        warnings.warn(f"partition={partition} leaves {unassigned} at no client", stacklevel=3)
    if empty := [client for client, rows_k in enumerate(rows) if not len(rows_k)]:
        warnings.warn(f"partition={partition} leaves clients {empty} without examples", stacklevel=3)
    return rows


def add_feature_noise(x: np.ndarray, rows_K: Sequence[np.ndarray], *, level: float, seed: int) -> np.ndarray:
    """Return the features with Gaussian noise of variance ``level (k + 1) / K`` at client k.

    The noise simulates sites with instruments of different quality.

    Args:
        x: features ``(N, ...)``, not changed.
        rows_K: rows of each client, from `partition_rows`.
        level: variance at the last client, >= 0.
        seed: seed of the noise.

    References:
        Li et al., ICDE 2022, arXiv:2102.02079 (noise-based feature imbalance).
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
