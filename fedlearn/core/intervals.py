"""Confidence intervals: Wilson's interval of a share, and the bootstrap over examples or over clients.

Shapes: N examples, U units that are drawn, R replicates, M sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
NORMAL_QUANTILE = 1.959963984540054  # two-sided quantile for the level 0.95
MIN_CLIENTS = 10  # fewer clients are too few draws for an interval over clients
MAX_REPLICATES, MIN_REPLICATES = 1000, 200
MAX_DRAWS = 20_000_000  # examples in all replicates, which bounds the time to about a second
MAX_BLOCK = 2_000_000  # weights of examples at once

Interval = tuple[float, float]


def wilson_interval(successes: int, trials: int) -> Interval:
    """Return the 95 % interval of a share; (NaN, NaN) without trials.

    It has a width above 0 also for the shares 0 and 1.

    Reference: Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, JASA 22, 1927.

    >>> [round(bound, 3) for bound in wilson_interval(9, 10)]
    [0.596, 0.982]
    """
    if not trials:
        return math.nan, math.nan
    share, z2 = successes / trials, NORMAL_QUANTILE**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    margin = NORMAL_QUANTILE / (1 + z2 / trials)
    margin *= math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - margin), min(1.0, centre + margin)


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Draw held-out units with replacement: clients, or the examples within each client.

    Attributes:
        unit_N: unit of each example, ascending from 0.
        stratum_U: client of each unit, ascending from 0. Units are drawn within their client. All zero draws over all
            units.
        method: the method in one sentence.
        num_replicates: number of replicates, R.
    """

    unit_N: np.ndarray
    stratum_U: np.ndarray
    method: str
    num_replicates: int = MAX_REPLICATES

    def weights(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the number of draws of each unit, in blocks ``(R', U)`` of at most `MAX_BLOCK` examples."""
        num_units = len(self.stratum_U)
        size_S = np.bincount(self.stratum_U)
        first_U = (np.cumsum(size_S) - size_S)[self.stratum_U]
        size_U = size_S[self.stratum_U]
        rows = max(1, MAX_BLOCK // max(1, len(self.unit_N)))
        for start in range(0, self.num_replicates, rows):
            count = min(rows, self.num_replicates - start)
            drawn = first_U + (rng.random((count, num_units)) * size_U).astype(np.int64)
            drawn += num_units * np.arange(count)[:, None]
            draws = np.bincount(drawn.ravel(), minlength=count * num_units)
            yield draws.reshape(count, num_units).astype(np.float64)

    def unit_sums(self, value_NM: np.ndarray) -> np.ndarray:
        """Return the sums of the values over the examples of each unit, ``(U, M)``."""
        start_U = np.searchsorted(self.unit_N, np.arange(len(self.stratum_U)))
        return np.add.reduceat(np.asarray(value_NM, np.float64), start_U, axis=0)


def bootstrap_of(client_N: np.ndarray, unit_N: np.ndarray | None = None) -> Bootstrap:
    """Return the bootstrap for held-out examples of clients.

    With at least `MIN_CLIENTS` clients it draws clients, so the interval is about new clients of the same kind. With
    fewer clients it draws examples within each client, so the interval is about new examples of the same clients.

    Args:
        client_N: client of each example, from 0, ascending.
        unit_N: group of examples that are drawn together, e.g. a text, ascending from 0; None draws single examples.
    """
    num_clients, num_replicates = int(client_N[-1]) + 1, MAX_DRAWS // max(1, len(client_N))
    num_replicates = max(MIN_REPLICATES, min(MAX_REPLICATES, num_replicates))
    if num_clients >= MIN_CLIENTS:
        unit_N, stratum_U = client_N, np.zeros(num_clients, np.int64)
        method = (
            f"Bootstrap over clients: {num_replicates:,} replicates draw {num_clients:,} clients with replacement. "
            "The intervals are about new clients of the same kind."
        )
    else:
        unit_N = np.arange(len(client_N)) if unit_N is None else unit_N
        stratum_U = client_N[np.searchsorted(unit_N, np.arange(int(unit_N[-1]) + 1))]
        method = _method_within_clients(num_clients, num_replicates)
    return Bootstrap(unit_N=unit_N, stratum_U=stratum_U, method=method, num_replicates=num_replicates)


def _method_within_clients(num_clients: int, num_replicates: int) -> str:
    text = f"Bootstrap over examples: {num_replicates:,} replicates draw examples with replacement"
    if num_clients == 1:
        return f"{text}. The intervals are about new examples of the same population."
    return (
        f"{text} within each client. The intervals are about new examples of the same {num_clients} clients. "
        "They do not cover differences between clients, because the clients are too few."
    )


def interval_of(value_R: np.ndarray) -> Interval:
    """Return the 2.5th and the 97.5th percentile of the defined replicates; (NaN, NaN) if none is defined."""
    defined_R = value_R[np.isfinite(value_R)]
    if not len(defined_R):
        return math.nan, math.nan
    low, high = np.quantile(defined_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class RankedScores:
    """Compute AUC and average precision of a score for many weightings of the examples, with one sort.

    Args:
        score_N: scores; a high score means positive.
        positive_N: True for a positive example.
    """

    def __init__(self, score_N: np.ndarray, positive_N: np.ndarray) -> None:
        self._order_N = np.argsort(-score_N, kind="stable")
        score_N = score_N[self._order_N]
        self._start_T = np.append(0, np.flatnonzero(np.diff(score_N)) + 1)  # first example of each group of ties
        self._positive_N = positive_N[self._order_N].astype(np.float64)

    def areas(self, weight_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return AUC and average precision of each weighting, ``(R,)``; NaN without one of the kinds of examples."""
        weight_RN = weight_RN[:, self._order_N]
        hit_RT = np.add.reduceat(weight_RN * self._positive_N, self._start_T, axis=1)
        miss_RT = np.add.reduceat(weight_RN, self._start_T, axis=1) - hit_RT
        hits_RT, misses_RT = np.cumsum(hit_RT, axis=1), np.cumsum(miss_RT, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            above_R = (miss_RT * (hits_RT - hit_RT / 2)).sum(axis=1)
            auc_R = above_R / (hits_RT[:, -1] * misses_RT[:, -1])
            total_RT = hits_RT + misses_RT
            precision_RT = np.divide(hits_RT, total_RT, out=np.zeros_like(hits_RT), where=total_RT > 0)
            return auc_R, (hit_RT * precision_RT).sum(axis=1) / hits_RT[:, -1]
