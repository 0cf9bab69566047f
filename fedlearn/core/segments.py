"""Sum and rank consecutive segments of examples, all segments at once: one segment for each client.

Shapes: K segments, N examples.

Sums over a segment do not depend on other segments, so a client that evaluates alone gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlearn.errors import DataError


@dataclass(frozen=True)
class Counts:
    """Add one to some cells of a table for each example, without a table per example.

    A confusion matrix of many classes needs this form: its table per example would have C x C numbers.

    Args:
        cells: cells of each example, ``(N,)`` or ``(N, ...)`` integers; a cell is a position in the flat table, and a
            negative number is no cell.
        shape: shape of the table.
    """

    cells: np.ndarray
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.cells)


class Segments:
    """Divide N examples into K consecutive segments.

    Args:
        sizes_K: number of examples of each segment, >= 1.
    """

    def __init__(self, sizes_K: np.ndarray) -> None:
        self.sizes_K = sizes_K
        self.start_K = np.cumsum(sizes_K) - sizes_K
        self.index_N = np.repeat(np.arange(len(sizes_K)), sizes_K)
        self._last: tuple[np.ndarray, Ranking] | None = None

    def sum(self, values: np.ndarray | Counts) -> np.ndarray:
        """Return the sum of the values ``(N, ...)`` over each segment, ``(K, ...)``."""
        if isinstance(values, Counts):
            return self._count(values)
        return np.add.reduceat(values, self.start_K, axis=0)

    def _count(self, counts: Counts) -> np.ndarray:
        size = int(np.prod(counts.shape))
        if counts.cells.max(initial=0) >= size:
            raise DataError("a target is out of range: it has a larger number than the outputs of the model")
        cells = counts.cells + size * self.index_N.reshape(-1, *(1,) * (counts.cells.ndim - 1))
        return np.bincount(cells[counts.cells >= 0], minlength=len(self.sizes_K) * size).reshape(-1, *counts.shape)

    def mean(self, values_N: np.ndarray) -> np.ndarray:
        """Return the mean of the values over each segment."""
        return np.asarray(self.sum(values_N) / self.sizes_K)

    def ranking(self, score_N: np.ndarray) -> Ranking:
        """Return the examples in ascending order of their scores within each segment.

        The last order is kept, because several metrics rank the same scores.
        """
        if self._last is None or not np.array_equal(self._last[0], score_N):
            self._last = (score_N, self._rank(score_N))
        return self._last[1]

    def _rank(self, score_N: np.ndarray) -> Ranking:
        order_N = np.argsort(score_N, kind="stable")  # ties in one order, alone and among other segments
        small = len(self.sizes_K) <= np.iinfo(np.uint16).max
        index_N = self.index_N.astype(np.uint16) if small else self.index_N  # NumPy sorts 16-bit integers by radix
        order_N = order_N[np.argsort(index_N[order_N], kind="stable")]
        return Ranking(self, order_N, score_N[order_N])


class Ranking:
    """Hold the order of the examples of each segment by their scores.

    Args:
        segments: the segments.
        order_N: positions of the examples, ascending by segment and by score.
        score_N: scores in this order.
    """

    def __init__(self, segments: Segments, order_N: np.ndarray, score_N: np.ndarray) -> None:
        self.segments, self.order_N = segments, order_N
        is_new_N = np.empty(len(score_N), bool)
        is_new_N[1:] = score_N[1:] != score_N[:-1]
        is_new_N[segments.start_K] = True
        first_T = np.flatnonzero(is_new_N)  # first example of each group of ties
        group_N = np.cumsum(is_new_N) - 1
        self._first_N = first_T[group_N]
        self._last_N = np.append(first_T[1:], len(score_N))[group_N]  # one past the last example of the group

    def roc_auc(self, positive_N: np.ndarray) -> np.ndarray:
        """Return the share of (positive, negative) pairs in the correct order; ties count half (Mann, Whitney, 1947).

        The value of a segment without positives or without negatives is NaN.
        """
        positive_N = positive_N[self.order_N]
        negatives_M = np.concatenate([[0], np.cumsum(~positive_N)])
        twice_below_N = negatives_M[self._first_N] + negatives_M[self._last_N]
        twice_below_N = twice_below_N - 2 * negatives_M[self.segments.start_K][self.segments.index_N]
        count_K = self.segments.sum(positive_N.astype(np.int64))
        mean_K = self.segments.sum(np.where(positive_N, twice_below_N, 0)) / count_K
        return np.asarray(mean_K / (2 * (self.segments.sizes_K - count_K)))

    def average_precision(self, positive_N: np.ndarray) -> np.ndarray:
        """Return the mean over positive examples of the precision at their score; NaN without a positive."""
        positive_N = positive_N[self.order_N]
        positives_M = np.concatenate([[0], np.cumsum(positive_N)])
        end_K = self.segments.start_K + self.segments.sizes_K
        end_N = end_K[self.segments.index_N]
        precision_N = (positives_M[end_N] - positives_M[self._first_N]) / (end_N - self._first_N)
        return np.asarray(
            self.segments.sum(np.where(positive_N, precision_N, 0.0)) / self.segments.sum(positive_N.astype(np.int64))
        )
