"""Check the rows of clients that a partition returns.

Shapes: N examples.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np

from fedlearn.data.partition import Partition, Rows, as_partition, partition_rows
from fedlearn.errors import SettingError

NUM_EXAMPLES = 600
NUM_NATURAL_CLIENTS = 7


def check_partition(partition: Partition | str, *, rows: Rows | None = None, seed: int = 1) -> None:
    """Check that a partition divides rows among clients as scenarios require.

    Args:
        partition: partition, or the name of a kind.
        rows: labels, natural clients and order; None takes 600 rows of ten classes.
        seed: seed of the partition.

    Raises:
        AssertionError: a guarantee does not hold; the message names it.

    >>> from fedlearn.data.partition import Iid
    >>> check_partition(Iid(num_clients=5))
    """
    partition, rows = as_partition(partition), rows or example_rows()
    before = [None if array is None else array.copy() for array in _arrays(rows)]
    random_state = _global_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = list(partition.client_rows(rows, seed))
    assert np.array_equal(random_state, _global_state()), "it must not draw from NumPy's global generator"
    for array, copy in zip(_arrays(rows), before, strict=True):
        unchanged = array is None or copy is None or np.array_equal(array, copy)
        assert unchanged, "it must not change its inputs"
    _check_rows(partition, first, len(rows), is_warned=bool(caught))
    _check_reproducible(partition, first, rows, seed)
    _check_real_targets(partition, rows, seed)
    text = str(partition)
    assert len(text.splitlines()) == 1, "str(partition) must be one line, for the header of a run"


def example_rows() -> Rows:
    """Return 600 rows of ten classes of different sizes, with seven natural clients and an order."""
    rng = np.random.default_rng(7)
    labels_N = np.concatenate([np.arange(10).repeat(20), rng.integers(0, 10, NUM_EXAMPLES - 200)])
    natural_N = rng.permutation(np.arange(NUM_EXAMPLES) % NUM_NATURAL_CLIENTS)
    return Rows(labels_N=labels_N, natural_N=natural_N, order_N=rng.standard_normal(NUM_EXAMPLES))


def _global_state() -> np.ndarray:
    state: Any = np.random.get_state()  # noqa: NPY002
    return np.array(state[1])


def _arrays(rows: Rows) -> tuple[np.ndarray | None, ...]:
    return rows.labels_N, rows.natural_N, rows.order_N


def _check_rows(partition: Partition, rows_K: list[np.ndarray], num_examples: int, *, is_warned: bool) -> None:
    num_clients = partition.num_clients
    assert num_clients in (None, len(rows_K)), f"it must return rows of {num_clients} clients, not of {len(rows_K)}"
    for client, rows_k in enumerate(rows_K):
        kind = isinstance(rows_k, np.ndarray) and rows_k.ndim == 1 and rows_k.dtype.kind in "iu"
        assert kind, f"client {client} needs an array of row numbers (N,) of an integer dtype"
        assert len(rows_k) or is_warned, f"client {client} is empty, and no warning says so"
    used_N = np.concatenate(rows_K)
    in_range = not len(used_N) or 0 <= used_N.min() <= used_N.max() < num_examples
    assert in_range, f"row numbers must be in 0..{num_examples - 1}"
    assert len(np.unique(used_N)) == len(used_N), "a row must be at one client only"
    missing = num_examples - len(used_N)
    assert not missing or not partition.covers_all_rows, f"{missing} rows are at no client, but covers_all_rows is True"


def _check_reproducible(partition: Partition, first: list[np.ndarray], rows: Rows, seed: int) -> None:
    """Compare with a second call after draws from the global generators."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        np.random.random()  # noqa: NPY002
        random.random()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = list(partition.client_rows(rows, seed))
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
    equal = len(first) == len(again) and all(map(np.array_equal, first, again))
    assert equal, "equal arguments must give equal rows, also after other draws from the global generators"


def _check_real_targets(partition: Partition, rows: Rows, seed: int) -> None:
    """Check that real targets are divided, or refused with a `SettingError`."""
    targets_N = rows.labels_N + 0.5
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            partition_rows(partition, targets_N, rows.natural_N, order_N=rows.order_N, seed=seed)
    except SettingError:
        assert partition.needs_classes, "it refuses real targets, but needs_classes is False"
    except Exception as error:
        raise AssertionError(f"real targets raise {error!r}; set needs_classes = True to refuse them") from error
