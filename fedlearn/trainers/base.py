"""What an engine asks of a trainer, and what every trainer shares.

Shapes: K clients in a block, D parameters laid flat, N examples, S local steps, B batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heapreplace
from typing import Any

import numpy as np

from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.core.random import Purpose, generator, secret_uniforms, seed_sequence
from fedlearn.core.records import Array, ClientWork, LocalSettings, Request
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: spreads neighbours
MAX_RESIDENT_BYTES = 2**30  # of examples that are kept in one piece from round to round
Initializer = Callable[[Layout, np.random.Generator], np.ndarray]


class TrainerWrapper:
    """What a trainer around another one leaves to it.

    Args:
        trainer: the one within.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def framework(self) -> str:
        """Of the trainer."""
        return self.trainer.framework

    @property
    def device(self) -> str:
        """Of the trainer."""
        return self.trainer.device

    @property
    def layout(self) -> Layout:
        """Of the trainer."""
        return self.trainer.layout

    @property
    def supports_dp_sgd(self) -> bool:
        """Of the trainer."""
        return self.trainer.supports_dp_sgd

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """See `Trainer.describe_batching`."""
        return self.trainer.describe_batching(num_clients, num_examples)

    def init(self, seed: int) -> np.ndarray:
        """See `Trainer.init`."""
        return self.trainer.init(seed)

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """See `Trainer.predict`."""
        return self.trainer.predict(params_D, x)


def round_of(request: Request, work: ClientWork) -> int:
    """The round from which a client's random numbers follow."""
    return request.round if work.round is None else work.round


def rounds_of(request: Request, work: Sequence[ClientWork]) -> np.ndarray:
    """The same of K clients (K)."""
    return np.array([round_of(request, one) for one in work], np.int64)


def draw_by_round(rounds_K: np.ndarray, draw: Callable[[int], Any]) -> np.ndarray:
    """What is drawn for the round of each client (K x ...), each round's once."""
    rounds, back_K = np.unique(rounds_K, return_inverse=True)
    return np.array([draw(round) for round in rounds.tolist()])[back_K]


def batch_plans(
    request: Request, clients_K: np.ndarray, sizes_K: np.ndarray, rounds_K: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples make up each local step of K clients, for both frameworks and all engines.

    Every pass visits each example once in a fresh random order. With ``local.steps`` passes go on until the steps are
    done; a batch never spans two passes. A pass is ordered by 64-bit hashes of (seed, round, client, pass, example), so
    a whole block is drawn at once and a client's batches do not depend on who else is in it.

    Returns:
        ``(K, S, B)`` int32 row numbers, -1 where a batch is not full or a client has fewer steps, and each client's
        number of steps ``(K,)``.

    Reference: the hash is the finaliser of Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators*,
    OOPSLA 2014.
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
    """As `batch_plans`, for DP-SGD: each step takes each of N examples with probability ``min(1, batch_size / N)``,
    independently.

    As many steps as plain training would take; a batch may be empty. Who is drawn must stay unknown for amplification
    to hold, so that real clients draw from the operating system's entropy instead of the run's seed.
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
    order: Request, clients_K: np.ndarray, rounds_K: np.ndarray | None, number: int, num_examples: int
) -> np.ndarray:
    """``(K, N)`` 64-bit hashes, a function of (seed, round, client, pass, example) alone."""
    root_K = draw_by_round(
        np.array([order.round]) if rounds_K is None else rounds_K,
        lambda round: seed_sequence(order.seed, Purpose.BATCHES, round=round).generate_state(1, np.uint64)[0],
    )
    client_K1 = _mixed(_mixed(root_K + np.asarray(clients_K, np.uint64)) + np.uint64(number))[:, None]
    return _mixed(client_K1 + GOLDEN * np.arange(1, num_examples + 1, dtype=np.uint64))


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def class_counts(trainer: Trainer, task: str, request: Request, work: Sequence[ClientWork]) -> np.ndarray:
    """How many training examples of each class K clients have: ``(K, C)`` float32, C >= 2, for `LocalRule.adjust_logits`.

    Raises:
        SettingError: the task has no classes.
    """
    require(task != "regression", "strategy", "one that adjusts logits", "a scenario with classes", "strategy=fedavg")
    num_classes = max(2, trainer.predict(request.params_D, work[0].examples.x[:1]).shape[1])
    return np.stack([np.bincount(one.examples.y.astype(np.int64), minlength=num_classes) for one in work]).astype(
        np.float32
    )


def require_features(has_features: bool) -> None:
    """Refuse a model that has no features for `LocalRule.feature_penalty`.

    Raises:
        SettingError: it has none.
    """
    expected = "a model that ends in one affine map (torch.nn.Linear, flax.linen.Dense) of features that it learns"
    require(has_features, "strategy", "one that compares features", expected, "model=mlp, or strategy=fedprox")


def shared_base_array(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray | None, np.ndarray]:
    """The array of which all these are slices of whole rows, and where each starts; None if there is none."""
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
    """Row numbers for each worker, so that the sums of ``costs`` are close: the largest first, to the least laden.

    Args:
        costs: of each row.
        num_shares: >= 1; fewer where there are fewer rows.
        max_size: rows in a share; None for no bound.

    >>> [share.tolist() for share in balanced([5, 1, 1, 4], 2)]
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


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def initial_parameters(
    layout: Layout, initial: Initializer | None, seed: int, buffers: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """``initial(layout, rng)`` of the parameters, or torch's default law where it is None, beside the given buffers."""
    first_D = (initial or default_initial_parameters)(layout.trainable, generator(seed, Purpose.INIT))
    return layout.pack({**layout.trainable.unpack(first_D), **buffers}) if buffers else first_D


def refuse_dp_sgd_with_buffers(layout: Layout, local: LocalSettings) -> None:
    """Refuse DP-SGD for a model with statistics of batches.

    They make an example's output, and so its gradient, depend on the others in its batch: clipping bounds no single
    example's part, and the statistics themselves would leave without noise.

    Raises:
        SettingError: that is asked for.
    """
    some = ", ".join(layout.buffers[:2])
    expected = f"another, or a model with group norm: statistics of this one ({some}) mix the examples of a batch"
    ok = local.example_dp is None or not layout.buffers
    require(ok, "privacy", "example", expected, "privacy=central with buffers=local, or model=gn_cnn")
