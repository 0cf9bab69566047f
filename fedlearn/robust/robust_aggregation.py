"""Compute the parts of robust aggregation rules: medians, trimmed means, distances between updates.

Shapes: K clients, D parameters, flattened, C columns in a block.

Coordinate-wise rules process a few columns at a time, which limits their memory. Sums are in float64 if the array
library has it, see `fedlearn.algorithm.aggregation.add_rows`.

All clients have equal weight, because a malicious client could report any number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from fedlearn.algorithm.aggregation import add_rows, divide_total
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import Array
from fedlearn.core.threads import map_in_threads, num_threads
from fedlearn.errors import is_count, require

MAX_ELEMENTS = 2**22  # elements in a block of columns: 16 MiB in float32
TILE_ELEMENTS = 2**17  # elements of a block that are converted at a time; they fit into the cache
Result = TypeVar("Result")


def column_blocks(updates_KD: Array, *, parts: int = 1) -> Iterator[slice]:
    """Yield the columns of the matrix in blocks of a few columns, of which ``parts`` are in memory at a time."""
    width = max(1, MAX_ELEMENTS // (max(1, len(updates_KD)) * parts))
    for start in range(0, updates_KD.shape[1], width):
        yield slice(start, start + width)


def map_blocks(function: Callable[[slice], Result], updates_KD: Array, *, parts: int = 1) -> Iterator[Result]:
    """Yield ``function(columns)`` for each block of columns, in order. NumPy arrays use all cores.

    Sums over columns depend on the blocks in their last bits, so they need the default of ``parts``.
    """
    is_numpy = isinstance(updates_KD, np.ndarray)
    return (map_in_threads if is_numpy else map)(function, column_blocks(updates_KD, parts=parts))


def map_column_blocks(rule: Callable[[Array], Array], updates_KD: Array) -> Array:
    """Apply ``rule`` (K x C to C) to each block of columns, and concatenate the results (D)."""
    blocks = map_blocks(lambda columns: rule(updates_KD[:, columns]), updates_KD, parts=num_threads())
    return array_namespace(updates_KD).concat([*blocks])


def sort_columns(updates_KC: Array) -> Array:
    """Sort each column. NumPy sorts adjacent numbers faster, so the columns become rows for the sort."""
    if not isinstance(updates_KC, np.ndarray):
        return array_namespace(updates_KC).sort(updates_KC, axis=0)
    sorted_CK = np.ascontiguousarray(updates_KC.T)
    sorted_CK.sort(axis=1)
    return np.ascontiguousarray(sorted_CK.T)


def unweighted_mean(updates_KD: Array) -> Array:
    """Return the mean of the rows, with equal weights."""
    return divide_total(add_rows(None, updates_KD, np.ones(len(updates_KD))), len(updates_KD))


def weighted_mean(updates_KD: Array, weights_K: np.ndarray) -> Array:
    """Return the weighted mean ``sum_k weights_k updates_k / sum_k weights_k``."""
    return divide_total(add_rows(None, updates_KD, weights_K), float(np.sum(weights_K)))


def distances_to(updates_KD: Array, center_D: Array) -> np.ndarray:
    """Return ``||u_k - center||`` of each client (K), computed in float64 if the array library has it."""

    def block_squares(columns: slice) -> np.ndarray:
        updates_KC, center_C = updates_KD[:, columns], center_D[columns]
        height, parts = max(1, TILE_ELEMENTS // updates_KC.shape[1]), []
        for k in range(0, len(updates_KC), height):
            difference_HC = _as_float64(updates_KC[k : k + height] - center_C)
            parts.append(as_numpy((difference_HC * difference_HC).sum(axis=1)))
        return np.concatenate(parts)

    return np.sqrt(_sum(map_blocks(block_squares, updates_KD), len(updates_KD)))


def inner_products(updates_KD: Array, vector_D: Array) -> np.ndarray:
    """Return ``<u_k, vector>`` of each client (K), computed in float64 if the array library has it."""

    def block_products(columns: slice) -> np.ndarray:
        return as_numpy(_as_float64(updates_KD[:, columns]) @ _as_float64(vector_D[columns]))

    return _sum(map_blocks(block_products, updates_KD), len(updates_KD))


def _sum(parts: Iterable[np.ndarray], *shape: int) -> np.ndarray:
    """Return the sum of float64 arrays, added in order."""
    total = np.zeros(shape)
    for part in parts:
        total += part
    return total


def _as_float64(array: Array) -> Array:
    """Convert an array to float64. JAX arrays are not converted: JAX has no float64 unless a global flag enables it."""
    xp = array_namespace(array)
    return array if is_jax_array(array) else xp.astype(array, xp.float64)


def nearest_neighbor_weights(distances_KK: np.ndarray, num_nearest: int) -> np.ndarray:
    """Return weights (K x K) that replace each update by the mean of its ``num_nearest`` nearest updates.

    Args:
        distances_KK: distances between updates, from `squared_distances`.
        num_nearest: number of updates in each mean, in 1..K; the update itself is one of them.

    Reference: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, *Fixing by Mixing: A Recipe for Optimal Byzantine
    ML under Heterogeneity*, AISTATS 2023, arXiv:2302.01772, Algorithm 2.
    """
    order_KK = np.lexsort((np.broadcast_to(distances_KK.sum(axis=0), distances_KK.shape), distances_KK), axis=1)
    weights_KK = np.zeros(distances_KK.shape)
    np.put_along_axis(weights_KK, order_KK[:, :num_nearest], 1 / num_nearest, axis=1)
    return weights_KK


def bucket_weights(permutation_K: np.ndarray, size: int) -> np.ndarray:
    """Return weights (M x K) of the means of ``size`` clients at a time. The last bucket may be smaller.

    Args:
        permutation_K: row numbers of the clients, in the order of the buckets.
        size: clients in a bucket, >= 1.

    Reference: Karimireddy, He, Jaggi, *Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing*, ICLR 2022,
    arXiv:2006.09365, Algorithm 1.
    """
    groups = [permutation_K[start : start + size] for start in range(0, len(permutation_K), size)]
    weights_MK = np.zeros((len(groups), len(permutation_K)))
    for m, group in enumerate(groups):
        weights_MK[m, group] = 1 / len(group)
    return weights_MK


def coordinate_median(updates_KD: Array) -> Array:
    """Return the median of each coordinate; for an even number of clients, the mean of the middle two values.

    *Guarantees*: if fewer than half of the clients are malicious, each coordinate is within the range of the honest
    updates.
    """
    return map_column_blocks(lambda updates_KC: median_of_sorted(sort_columns(updates_KC)), updates_KD)


def median_of_sorted(sorted_KC: Array) -> Array:
    """Return the median of each coordinate, from rows that are sorted in each coordinate."""
    num_rows = len(sorted_KC)
    return unweighted_mean(sorted_KC[(num_rows - 1) // 2 : num_rows // 2 + 1])


def trimmed_mean(updates_KD: Array, num_trimmed: int) -> Array:
    """Return the mean of each coordinate without its ``num_trimmed`` smallest and its ``num_trimmed`` largest values.

    *Guarantees*: if at most ``num_trimmed`` clients are malicious, each coordinate is within the range of the honest
    updates.
    """
    kept = slice(num_trimmed, len(updates_KD) - num_trimmed)
    return map_column_blocks(lambda updates_KC: unweighted_mean(sort_columns(updates_KC)[kept]), updates_KD)


def mean_around_median(updates_KD: Array, num_closest: int) -> Array:
    """Return the mean, in each coordinate, of the ``num_closest`` values closest to the median.

    These values are adjacent in sorted order. The search therefore compares only ``K - num_closest + 1`` runs of
    values.
    """
    xp = array_namespace(updates_KD)

    def rule(updates_KC: Array) -> Array:
        sorted_KC = sort_columns(updates_KC)
        median_C = median_of_sorted(sorted_KC)
        best_C, closest_C = None, None
        for first in range(len(sorted_KC) - num_closest + 1):
            run = sorted_KC[first : first + num_closest]
            distance_C = xp.maximum(median_C - run[0], run[-1] - median_C)
            if best_C is None:
                best_C, closest_C = unweighted_mean(run), distance_C
            best_C = xp.where(distance_C < closest_C, unweighted_mean(run), best_C)
            closest_C = xp.minimum(distance_C, closest_C)
        return best_C

    return map_column_blocks(rule, updates_KD)


def squared_distances(updates_KD: Array) -> np.ndarray:
    """Return ``||u_i - u_j||^2`` of each pair of clients (K x K).

    Distances come from inner products in float64. The rounding error of the distance between honest updates is then
    negligible, even if a malicious update is far away. JAX has no float64 unless a global flag enables it, so NumPy
    computes the products of JAX arrays.
    """

    def block_products(columns: slice) -> np.ndarray:
        updates_KC = updates_KD[:, columns]
        wide_KC = _as_float64(as_numpy(updates_KC) if is_jax_array(updates_KC) else updates_KC)
        return as_numpy(wide_KC @ wide_KC.T)

    products_KK = _sum(map_blocks(block_products, updates_KD), len(updates_KD), len(updates_KD))
    norms_K = np.diag(products_KK)
    distances_KK = np.maximum(norms_K[:, None] + norms_K - (products_KK + products_KK.T), 0)
    np.fill_diagonal(distances_KK, 0)
    return distances_KK


def rank_by_krum(distances_KK: np.ndarray, num_malicious: int) -> np.ndarray:
    """Return the row numbers of clients, from the lowest to the highest score of Krum.

    ``s(i) = sum_{i -> j} ||u_i - u_j||^2`` over the ``K - f - 2`` other clients ``j`` closest to ``i``. If this number
    is one, the two closest clients have the same score. The sum of distances to all clients then decides.

    Args:
        distances_KK: squared distances between updates.
        num_malicious: tolerated number ``f`` of malicious clients.

    Reference: Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent*, NeurIPS 2017, arXiv:1703.02757, section 4.
    """
    others_KK = distances_KK + np.diag(np.full(len(distances_KK), np.inf))
    num_closest = max(1, len(distances_KK) - num_malicious - 2)
    scores_K = np.sort(others_KK, axis=1)[:, :num_closest].sum(axis=1)
    return np.lexsort((np.sort(distances_KK, axis=1).sum(axis=1), scores_K))


def select_by_krum(distances_KK: np.ndarray, num_malicious: int, num_selected: int) -> np.ndarray:
    """Return the row numbers of the clients that repeated Krum selects, in ascending order.

    Each step selects the client with the lowest score among the remaining clients.

    Args:
        distances_KK: squared distances between updates.
        num_malicious: tolerated number of malicious clients.
        num_selected: number of clients to select.

    Reference: El Mhamdi, Guerraoui, Rouault, *The Hidden Vulnerability of Distributed Learning in Byzantium*, ICML
    2018, arXiv:1802.07927, section 4: the first step of Bulyan.
    """
    remaining = np.arange(len(distances_KK))
    for _ in range(num_selected):
        remaining = np.delete(remaining, rank_by_krum(distances_KK[np.ix_(remaining, remaining)], num_malicious)[0])
    return np.setdiff1d(np.arange(len(distances_KK)), remaining)


def resolve_num_malicious(num_malicious: int | None, num_updates: int, *, per_malicious: int, offset: int = 3) -> int:
    """Return the tolerated number ``f`` of malicious clients.

    Args:
        num_malicious: ``f``; None takes the largest value with ``n >= per_malicious f + offset``.
        num_updates: number ``n`` of updates in the round.
        per_malicious: 2 for Krum, 4 for Bulyan.
        offset: 3 for both.

    Raises:
        SettingError: ``n`` is too small for ``f``.
    """
    name = "strategy.num_malicious"
    is_valid = num_malicious is None or is_count(num_malicious, at_least=0)
    require(is_valid, name, num_malicious, "null (the largest possible number), or a whole number >= 0", f"{name}=null")
    largest = (num_updates - offset) // per_malicious
    expected = f"n >= {per_malicious} num_malicious + {offset}, but a round has n = {num_updates} updates"
    fix = f"{name}={largest}" if largest >= 0 else "strategy=fedmedian, which works with any number of updates"
    require(largest >= (num_malicious or 0), name, num_malicious, expected, fix)
    return largest if num_malicious is None else num_malicious
