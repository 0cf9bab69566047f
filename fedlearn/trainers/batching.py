"""Draw random batches for local training, and distribute clients over processes.

All trainers and engines use these batches, so they train on the same examples in the same order.

Shapes: K clients in a block, N examples, S local steps, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heapreplace
from typing import Any

import numpy as np

from fedlearn.core.random import Purpose, secret_uniforms, seed_sequence
from fedlearn.core.records import ClientWork, Request

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio; hashes of neighbours then differ widely
PREDICTED_ROWS = 4096  # smallest number of rows of a part that `predict` passes to a model at once
MAX_RESIDENT_BYTES = 2**30  # maximum size of an array that stays on the device between rounds


def round_of(request: Request, work: ClientWork) -> int:
    """Return the round that seeds the random numbers of a client."""
    return request.round if work.round is None else work.round


def rounds_of(request: Request, work: Sequence[ClientWork]) -> np.ndarray:
    """Return the rounds that seed the random numbers of K clients, ``(K,)``."""
    return np.array([round_of(request, client_work) for client_work in work], np.int64)


def prediction_parts(x: np.ndarray, *, max_rows: int = 2 * PREDICTED_ROWS) -> list[np.ndarray]:
    """Divide inputs into the parts that `predict` passes to a model at once.

    Processes of a pool get parts of the default size. A process divides its part as one process divides all inputs.
    """
    parts = np.array_split(x, max(1, len(x) // PREDICTED_ROWS))
    return [few for part in parts for few in np.array_split(part, max(1, -(-len(part) // max_rows)))]


def draw_by_round(rounds_K: np.ndarray, draw: Callable[[int], Any]) -> np.ndarray:
    """Return ``draw(round)`` for the round of each client, ``(K, ...)``. Call ``draw`` once per distinct round."""
    rounds, back_K = np.unique(rounds_K, return_inverse=True)
    return np.array([draw(round) for round in rounds.tolist()])[back_K]


def batch_plans(
    request: Request, clients_K: np.ndarray, sizes_K: np.ndarray, rounds_K: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples of each local step of K clients, for all trainers and engines.

    Each pass visits every example once, in a new random order. With ``local.steps``, passes repeat until all steps are
    done. A batch never spans two passes.

    Hashes of (seed, round, client, pass, example), 64 bits each, order a pass. So NumPy draws a whole block at once,
    and the batches of a client do not depend on the other clients in the block.

    Args:
        request: seed, round and local settings.
        clients_K: ids of the clients.
        sizes_K: number of training examples of each client, >= 1.
        rounds_K: round that seeds each client; default the round of the request.

    Returns:
        Row numbers ``(K, S, B)`` int32, and the number of steps of each client, ``(K,)``. A row number is -1 if a
        batch is not full or a client has fewer steps.

    References:
        The hash is the finaliser of Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014.
    """
    local, sizes_K = request.local, np.asarray(sizes_K, np.int64)
    batch_size, largest = min(local.batch_size, int(sizes_K.max())), int(sizes_K.max())
    batches_K = -(-sizes_K // batch_size)  # in one pass
    steps_K = local.num_steps(sizes_K)
    plan_KSB = np.full((len(sizes_K), int(steps_K.max()), batch_size), -1, np.int32)
    batch_in_pass = np.arange(int(batches_K.max()))
    for number in range(int((-(-steps_K // batches_K)).max())):
        hash_KN = _hashes(request, clients_K, rounds_K, number, largest)
        hash_KN[np.arange(largest) >= sizes_K[:, None]] = np.iinfo(np.uint64).max  # sorts behind the examples
        pass_KN = np.argsort(hash_KN, axis=1).astype(np.int32)
        padded_KN = np.full((len(sizes_K), len(batch_in_pass) * batch_size), -1, np.int32)
        padded_KN[:, :largest] = np.where(np.arange(largest) < sizes_K[:, None], pass_KN, -1)
        step_KS = number * batches_K[:, None] + batch_in_pass
        clients, batches = np.nonzero((batch_in_pass < batches_K[:, None]) & (step_KS < steps_K[:, None]))
        batch_KSB = padded_KN.reshape(len(sizes_K), len(batch_in_pass), batch_size)
        plan_KSB[clients, step_KS[clients, batches]] = batch_KSB[clients, batches]
    return plan_KSB, steps_K


def poisson_plans(
    request: Request, clients_K: np.ndarray, sizes_K: np.ndarray, rounds_K: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return batches for DP-SGD: each step takes each of N examples with probability ``min(1, batch_size / N)``.

    Draws are independent, and a batch may be empty. The number of steps equals the number in training without DP-SGD.

    Privacy amplification by sampling requires that the drawn examples stay secret. Real clients therefore draw from
    the entropy of the operating system, not from the seed of the run.

    Arguments and result have the same meaning as in `batch_plans`.
    """
    local, sizes_K, largest = request.local, np.asarray(sizes_K, np.int64), int(np.max(sizes_K))
    steps_K = local.num_steps(sizes_K)
    rate_K1 = np.minimum(1.0, local.batch_size / sizes_K)[:, None]
    chosen: list[np.ndarray] = []
    for number in range(int(steps_K.max())):
        if request.deployed:
            uniform_KN = secret_uniforms((len(sizes_K), largest))
        else:
            uniform_KN = (_hashes(request, clients_K, rounds_K, number, largest) >> np.uint64(11)) * 2.0**-53
        taken_KN = (uniform_KN < rate_K1) & (np.arange(largest) < sizes_K[:, None])
        chosen.append(taken_KN & (number < steps_K)[:, None])
    widest = max(1, max(int(taken_KN.sum(axis=1).max()) for taken_KN in chosen))
    plan_KSB = np.full((len(sizes_K), len(chosen), widest), -1, np.int32)
    for number, taken_KN in enumerate(chosen):
        clients, rows = np.nonzero(taken_KN)
        place = np.cumsum(taken_KN, axis=1)[clients, rows] - 1
        plan_KSB[clients, number, place] = rows
    return plan_KSB, steps_K


def _hashes(
    request: Request, clients_K: np.ndarray, rounds_K: np.ndarray | None, number: int, num_examples: int
) -> np.ndarray:
    """Return 64-bit hashes of (seed, round, client, pass, example), ``(K, N)``."""
    root_K = draw_by_round(
        np.array([request.round]) if rounds_K is None else rounds_K,
        lambda round: seed_sequence(request.seed, Purpose.BATCHES, round=round).generate_state(1, np.uint64)[0],
    )
    client_K1 = mix_bits(mix_bits(root_K + np.asarray(clients_K, np.uint64)) + np.uint64(number))[:, None]
    return mix_bits(client_K1 + GOLDEN * np.arange(1, num_examples + 1, dtype=np.uint64))


def mix_bits(z: np.ndarray) -> np.ndarray:
    """Return 64-bit hashes of 64-bit numbers, by the finaliser of SplitMix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shared_base_array(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the array that contains all of these as slices of rows, and the first row of each slice, ``(K,)``.

    The array is None if the arrays have no common base, or if the base exceeds `MAX_RESIDENT_BYTES`.
    """
    whole = arrays[0].base
    if not (isinstance(whole, np.ndarray) and whole.flags.c_contiguous and whole.nbytes <= MAX_RESIDENT_BYTES):
        return None, np.zeros(0)
    shape, dtype = whole.shape[1:], whole.dtype
    same = all(v.base is whole and v.shape[1:] == shape and v.dtype == dtype and v.flags.c_contiguous for v in arrays)
    if not same or whole.ndim != arrays[0].ndim or not whole.size:
        return None, np.zeros(0)
    offsets_K = np.array([v.ctypes.data for v in arrays]) - whole.ctypes.data
    return whole, offsets_K // whole.strides[0]


def balance_shares(costs: Sequence[float], num_shares: int, *, max_size: int | None = None) -> list[np.ndarray]:
    """Return row numbers for each process, so that the shares have similar total costs.

    The function assigns rows in descending order of cost, each to the share with the least total cost.

    Args:
        costs: cost of each row.
        num_shares: number of shares, >= 1; the result has fewer shares if there are fewer rows.
        max_size: maximum number of rows in a share; None for no bound.

    >>> [share.tolist() for share in balance_shares([5, 1, 1, 4], 2)]
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(min(num_shares, len(costs)))]
    load = [(0.0, i) for i in range(len(shares))]
    for k in np.argsort(costs, kind="stable")[::-1].tolist():
        total, least = load[0]
        shares[least].append(k)
        if len(shares[least]) == max_size:
            heappop(load)
        else:
            heapreplace(load, (total + costs[k], least))
    return [np.sort(np.array(share)) for share in shares]
