"""Lay the inputs of a block of clients out for one compiled program, in few different shapes.

Shapes: K clients in a block, N examples, S local steps, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlearn.core.inputs import map_inputs, split_inputs
from fedlearn.core.records import LocalSettings
from fedlearn.trainers.batching import shared_base_array

MIN_STEPS = 8
MAX_PADDED_BYTES = 2**26  # bytes of inputs up to which a copy with more rows costs little memory


class BlockArrays:
    """Lay out examples and batch plans, so that different cohorts share one compiled program."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # sizes of compiled programs, by dimension
        self._resident: tuple[np.ndarray, Any] | None = None

    def share_size(self, size: int) -> int:
        """Return the number of clients of a compiled program for a share of this size."""
        if size == self._sizes.setdefault("clients", size):  # blocks have different sizes
            return size
        return 1 << (size - 1).bit_length() if size <= 16 else round_up(size)

    def inputs(self, arrays: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
        """Return the inputs of K clients on the device, and the first row of each client, ``(K,)``.

        If all inputs are slices of one array, as from `from_arrays`, this array stays on the device between rounds.
        Other inputs are concatenated in each round.
        """
        whole, starts_K = shared_base_array(arrays)
        if whole is None:
            return self.concatenate(arrays)
        if self._resident is None or self._resident[0] is not whole:
            self._resident = whole, to_device(_with_spare_rows(whole))
        return self._resident[1], starts_K

    def concatenate(self, arrays: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
        """Return the rows of K clients in one padded array, and the first row of each client, ``(K,)``."""
        sizes = [len(array) for array in arrays]
        num_rows = self._compiled_size("rows", sum(sizes), spare=1.25)
        padded = np.zeros((num_rows, *arrays[0].shape[1:]), arrays[0].dtype)
        np.concatenate(arrays, out=padded[: sum(sizes)])
        return to_device(padded), np.cumsum([0, *sizes[:-1]])

    def pad_plan(self, plan_KSB: np.ndarray, local: LocalSettings, largest: int) -> np.ndarray:
        """Return the plan, padded with -1 to one of few shapes.

        The number of steps is the largest of the run so far, with a reserve. The batch size is ``local.batch_size``, or
        the next power of two if all batches of this block are smaller.
        """
        clients, steps, batch = plan_KSB.shape
        width = min(local.batch_size, 1 << (batch - 1).bit_length())
        if local.example_dp:  # batches have random sizes, rarely above the mean plus three standard deviations
            usual = min(largest, local.batch_size + round(3 * local.batch_size**0.5))
            width = round_up(max(batch, usual))
        usual = max(MIN_STEPS, 1 << (steps - 1).bit_length())  # equal for similar data, such as other partitions
        num_steps = self._compiled_size("steps", usual, spare=2)
        padded_KSB = np.full((clients, num_steps, width), -1, np.int32)
        padded_KSB[:, :steps, :batch] = plan_KSB
        return padded_KSB

    def _compiled_size(self, dimension: str, needed: int, *, spare: float) -> int:
        """Return a size that seldom grows, so that different cohorts share one compiled program.

        The reserve costs memory, but no steps.
        """
        if needed > self._sizes.get(dimension, 0):
            self._sizes[dimension] = round_up(int(spare * needed))
        return self._sizes[dimension]


def _with_spare_rows(array: np.ndarray) -> np.ndarray:
    """Return a small array with zeros up to a common number of rows, so that similar data share compiled programs."""
    if array.nbytes > MAX_PADDED_BYTES:
        return array
    return np.concatenate([array, np.zeros((round_up(len(array)) - len(array), *array.shape[1:]), array.dtype)])


def to_device(array: np.ndarray) -> Any:
    """Return an array on the device. Several inputs are a mapping or a tuple of arrays."""
    return map_inputs(jnp.asarray, split_inputs(array))


def num_examples(x: Any) -> int:
    """Return the number of examples of the inputs of a model."""
    return len(jax.tree.leaves(x)[0])


def pad_rows(rows_K: np.ndarray, size: int) -> np.ndarray:
    """Return ``size`` rows, padded with zeros. A zero row is a client that takes no steps."""
    if len(rows_K) == size:
        return rows_K
    return np.concatenate([rows_K, np.zeros((size - len(rows_K), *rows_K.shape[1:]), rows_K.dtype)])


def round_up(size: int) -> int:
    """Round up to three significant bits, by at most a quarter, so that few programs are compiled."""
    unit = 1 << max(0, size.bit_length() - 3)
    return -(-size // unit) * unit
