"""What robust rules are made of: medians, trimmed means, distances between updates.

Shapes: K clients, D parameters laid flat, C of them at a time.

Coordinate-wise rules go over the matrix a few columns at a time, so that they need little memory beside it; sums are
taken in float64 where the array library has it (see `fedlearn.algorithm.aggregation.add_rows`).

Every client counts the same here: the number of examples that a client reports is for a malicious one to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from fedlearn.algorithm.aggregation import add_rows, divide_total
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import Array
from fedlearn.errors import is_count, require

MAX_ELEMENTS = 2**22  # of the matrix at a time: 16 MiB in float32


def column_blocks(updates_KD: Array) -> Iterator[Array]:
    """The matrix, a few columns at a time."""
    width = max(1, MAX_ELEMENTS // max(1, len(updates_KD)))
    for start in range(0, updates_KD.shape[1], width):
        yield updates_KD[:, start : start + width]


def map_column_blocks(rule: Callable[[Array], Array], updates_KD: Array) -> Array:
    """``rule`` of each block of columns, K x C to C, put together to D."""
    xp = array_namespace(updates_KD)
    return xp.concat([rule(updates_KC) for updates_KC in column_blocks(updates_KD)])


def unweighted_mean(updates_KD: Array) -> Array:
    """Return the mean with equal weights of all clients."""
    return divide_total(add_rows(None, updates_KD, np.ones(len(updates_KD))), len(updates_KD))


def weighted_mean(updates_KD: Array, weights_K: np.ndarray) -> Array:
    """Return the weighted mean ``sum_k weights_k updates_k / sum_k weights_k``."""
    return divide_total(add_rows(None, updates_KD, weights_K), float(np.sum(weights_K)))


def distances_to(updates_KD: Array, center_D: Array) -> np.ndarray:
    """Return ``||u_k - center||`` of each client, K; in float64 if the array library has it."""
    squares_K, start = np.zeros(len(updates_KD)), 0
    for updates_KC in column_blocks(updates_KD):
        apart_KC = _wide(updates_KC - center_D[start : start + updates_KC.shape[1]])
        squares_K += as_numpy((apart_KC * apart_KC).sum(axis=1))
        start += updates_KC.shape[1]
    return np.sqrt(squares_K)


def inner_products(updates_KD: Array, vector_D: Array) -> np.ndarray:
    """Return ``<u_k, vector>`` of each client, K; in float64 if the array library has it."""
    products_K, start = np.zeros(len(updates_KD)), 0
    for updates_KC in column_blocks(updates_KD):
        products_K += as_numpy(_wide(updates_KC) @ _wide(vector_D[start : start + updates_KC.shape[1]]))
        start += updates_KC.shape[1]
    return products_K


def _wide(array: Array) -> Array:
    """In float64; JAX has none unless a global flag turns it on."""
    xp = array_namespace(array)
    return array if is_jax_array(array) else xp.astype(array, xp.float64)


def nearest_neighbor_weights(distances_KK: np.ndarray, num_nearest: int) -> np.ndarray:
    """Return weights, K x K, that replace each update by the mean of its ``num_nearest`` closest, itself included.

    Reference: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, *Fixing by Mixing: A Recipe for Optimal Byzantine
    ML under Heterogeneity*, AISTATS 2023, arXiv:2302.01772, Algorithm 2.
    """
    order_KK = np.lexsort((np.broadcast_to(distances_KK.sum(axis=0), distances_KK.shape), distances_KK), axis=1)
    weights_KK = np.zeros(distances_KK.shape)
    np.put_along_axis(weights_KK, order_KK[:, :num_nearest], 1 / num_nearest, axis=1)
    return weights_KK


def bucket_weights(permutation_K: np.ndarray, size: int) -> np.ndarray:
    """Return weights, M x K, of the means of ``size`` clients at a time in the given order; the last bucket may be
    smaller.

    Reference: Karimireddy, He, Jaggi, *Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing*, ICLR 2022,
    arXiv:2006.09365, Algorithm 1.
    """
    groups = [permutation_K[start : start + size] for start in range(0, len(permutation_K), size)]
    weights_MK = np.zeros((len(groups), len(permutation_K)))
    for m, group in enumerate(groups):
        weights_MK[m, group] = 1 / len(group)
    return weights_MK


def coordinate_median(updates_KD: Array) -> Array:
    """Return the median of each coordinate; of an even number of clients, the mean of the middle two.

    *Guarantees*: as long as fewer than half of the clients are malicious, each coordinate lies within the range of
    the honest ones.
    """
    xp = array_namespace(updates_KD)
    return map_column_blocks(lambda updates_KC: median_of_sorted(xp.sort(updates_KC, axis=0)), updates_KD)


def median_of_sorted(sorted_KC: Array) -> Array:
    """The median of rows that are sorted in each coordinate."""
    num = len(sorted_KC)
    return unweighted_mean(sorted_KC[(num - 1) // 2 : num // 2 + 1])


def trimmed_mean(updates_KD: Array, num_trimmed: int) -> Array:
    """Return the mean of each coordinate without its ``num_trimmed`` smallest and its ``num_trimmed`` largest values.

    *Guarantees*: as long as at most ``num_trimmed`` clients are malicious, each coordinate lies within the range of
    the honest ones.
    """
    xp = array_namespace(updates_KD)
    kept = slice(num_trimmed, len(updates_KD) - num_trimmed)
    return map_column_blocks(lambda updates_KC: unweighted_mean(xp.sort(updates_KC, axis=0)[kept]), updates_KD)


def mean_around_median(updates_KD: Array, num_closest: int) -> Array:
    """Return the mean, in each coordinate, of the ``num_closest`` values closest to the median.

    Among sorted values those are neighbours, so that only ``K - num_closest + 1`` runs of them need to be looked at.
    """
    xp = array_namespace(updates_KD)

    def rule(updates_KC: Array) -> Array:
        sorted_KC = xp.sort(updates_KC, axis=0)
        median_C = median_of_sorted(sorted_KC)
        best_C, closest_C = None, None
        for first in range(len(sorted_KC) - num_closest + 1):
            run = sorted_KC[first : first + num_closest]
            reach_C = xp.maximum(median_C - run[0], run[-1] - median_C)
            if best_C is None:
                best_C, closest_C = unweighted_mean(run), reach_C
            best_C = xp.where(reach_C < closest_C, unweighted_mean(run), best_C)
            closest_C = xp.minimum(reach_C, closest_C)
        return best_C

    return map_column_blocks(rule, updates_KD)


def squared_distances(updates_KD: Array) -> np.ndarray:
    """Return ``||u_i - u_j||^2`` of each pair of clients, K x K.

    From inner products in float64, which leaves nothing of the distance between two honest updates to rounding, however
    far away a malicious one is. JAX, which has no float64 unless a global flag turns it on, lends its arrays to NumPy.
    """
    xp = array_namespace(updates_KD)
    products_KK = np.zeros((len(updates_KD), len(updates_KD)))
    for updates_KC in column_blocks(updates_KD):
        if is_jax_array(updates_KC):
            wide_KC = np.asarray(as_numpy(updates_KC), np.float64)
        else:
            wide_KC = xp.astype(updates_KC, xp.float64)
        products_KK += as_numpy(wide_KC @ wide_KC.T)
    norms_K = np.diag(products_KK)
    distances_KK = np.maximum(norms_K[:, None] + norms_K - (products_KK + products_KK.T), 0)
    np.fill_diagonal(distances_KK, 0)
    return distances_KK


def rank_by_krum(distances_KK: np.ndarray, num_malicious: int) -> np.ndarray:
    """Return the row numbers of clients, from the lowest to the highest score of Krum.

    ``s(i) = sum_{i -> j} ||u_i - u_j||^2`` over the ``K - f - 2`` other clients ``j`` closest to ``i``. Where that is
    one, the two closest clients score the same; the one closer to all others comes first.

    Reference: Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent*, NeurIPS 2017, arXiv:1703.02757, section 4.
    """
    others_KK = distances_KK + np.diag(np.full(len(distances_KK), np.inf))
    num_closest = max(1, len(distances_KK) - num_malicious - 2)
    scores_K = np.sort(others_KK, axis=1)[:, :num_closest].sum(axis=1)
    return np.lexsort((np.sort(distances_KK, axis=1).sum(axis=1), scores_K))


def select_by_krum(distances_KK: np.ndarray, num_malicious: int, num_selected: int) -> np.ndarray:
    """Return the clients that Krum chooses one after another, each among the remaining ones; ascending.

    Reference: El Mhamdi, Guerraoui, Rouault, *The Hidden Vulnerability of Distributed Learning in Byzantium*, ICML
    2018, arXiv:1802.07927, section 4: the first step of Bulyan.
    """
    left = np.arange(len(distances_KK))
    for _ in range(num_selected):
        left = np.delete(left, rank_by_krum(distances_KK[np.ix_(left, left)], num_malicious)[0])
    return np.setdiff1d(np.arange(len(distances_KK)), left)


def resolve_num_malicious(num_malicious: int | None, num_updates: int, *, per_malicious: int, offset: int = 3) -> int:
    """Return the tolerated number of malicious clients: as given, or the largest with ``n >= per_malicious f +
    offset``.

    Args:
        num_malicious: ``f``; None for the most.
        num_updates: ``n``.
        per_malicious: 2 for Krum, 4 for Bulyan.
        offset: 3 for both.

    Raises:
        SettingError: ``n`` is too small for ``f``.
    """
    name = "strategy.num_malicious"
    counts = num_malicious is None or is_count(num_malicious, at_least=0)
    require(counts, name, num_malicious, "null (as many as n allows), or a whole number >= 0", f"{name}=null")
    most = (num_updates - offset) // per_malicious
    expected = f"n >= {per_malicious} num_malicious + {offset}, but a round has n = {num_updates} updates"
    fix = f"{name}={most}" if most >= 0 else "strategy=fedmedian, which works with any number of updates"
    require(most >= (num_malicious or 0), name, num_malicious, expected, fix)
    return most if num_malicious is None else num_malicious
