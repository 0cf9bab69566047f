"""Masked updates: clients send masked integers, and the server sees only their sum.

Shapes: K clients in a block, D parameters, P parameters after padding to a power of two for a rotation.

A client clips and scales its update, and rounds it to integers modulo a power of two. Sums of integers are exact, so
the result does not depend on the engine, the order or the block size. Real nodes send the integers through the protocol
of `fedlearn.privacy.secagg`. Simulations add them without masks, because masks cancel in the sum. With
``protocol="full"``, simulations run the protocol too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil, floor, log2, sqrt
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import Aggregator
from fedlearn.algorithm.strategy import CompositionError, Strategy, extra_names
from fedlearn.algorithm.transforms import Context, Stage, Transform
from fedlearn.algorithm.transforms import clip_norm as clipped
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose
from fedlearn.core.records import Array, State, Updates
from fedlearn.errors import MissingExtra, SettingError, is_count, is_number, require
from fedlearn.privacy.secagg.cost import NoisySum
from fedlearn.privacy.secagg.discrete_noise import MAX_STD, RandomStream, conditional_round, draw_noise
from fedlearn.privacy.secagg.errors import SecAggAborted
from fedlearn.privacy.secagg.fixed_point import FixedPoint, require_finite
from fedlearn.privacy.secagg.rotation import max_flattening, next_power_of_two, rotate, unrotate

PROTOCOLS = ("sum", "full")
NOISES = ("skellam", "discrete_gaussian")
ROUNDING_SLACK = 1.01  # random rounding increases the norm by at most this factor; the noise is calibrated for it


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Settings of masked updates; ``protect`` applies them to a strategy.

    `fedlearn.privacy.mechanisms.secure_aggregation` describes the arguments: `secagg` without noise, and `distributed`
    with noise. ``noise`` is None for sums without noise.

    Raises:
        SettingError: A setting is out of range, or sums could wrap around.
        MissingExtra: The cryptography for ``protocol=full`` or for noise is not installed.
    """

    clip_norm: float
    bits: int = 20
    threshold: int | None = None
    cohort: int | None = None
    modulus_bits: int = 32
    protocol: str = "sum"
    noise: str | None = None
    noise_multiplier: float = 0.0
    flatten: float = 1.0
    num_parties: int | None = None  # parties of the population, each with one or more clients; None: one per client

    def __post_init__(self) -> None:
        if self.noise is not None:
            self._check_noise()
        known = self.protocol in PROTOCOLS
        require(known, "protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}", "protocol=sum")
        is_valid = self.cohort is None or is_count(self.cohort, at_least=2)
        require(is_valid, "cohort", self.cohort, "null, or a whole number >= 2", "cohort=null")
        positive = is_number(self.clip_norm, at_least=0) and 0 < self.clip_norm < float("inf")
        require(positive, "clip_norm", self.clip_norm, "a finite number > 0", "clip_norm=1.0")
        FixedPoint(bound=self.clip_norm, bits=self.bits, modulus_bits=self.modulus_bits, max_clients=self.cohort or 1)
        if self.cohort:
            self.threshold_of(self.cohort)
        if self.protocol == "full":
            _import_protocol()

    def _check_noise(self) -> None:
        positive = is_number(self.noise_multiplier, at_least=0) and 0 < self.noise_multiplier < float("inf")
        require(positive, "noise_multiplier", self.noise_multiplier, "a finite number > 0", "noise_multiplier=1.0")
        require(self.noise in NOISES, "noise", self.noise, f"one of {', '.join(NOISES)}", "noise=skellam")
        flat = is_number(self.flatten, at_least=1) and self.flatten < float("inf")
        require(flat, "flatten", self.flatten, "a number >= 1", "flatten=1")
        RandomStream.from_system()  # raises MissingExtra before the run starts

    def protect(self, strategy: Strategy, *, num_clients: int | None = None) -> Strategy:
        """Return the strategy with masked updates.

        Args:
            strategy: strategy with an equally weighted mean.
            num_clients: number of clients in the population, if it is known; needed if all clients take part.

        Raises:
            CompositionError: The mean is not equally weighted, or clients send further vectors.
            SettingError: Sums of a cohort could wrap around, or the threshold is out of range for the cohort.
        """
        _refuse_unless_equal(strategy)
        names = ", ".join(extra_names(strategy.local))
        if names:
            raise CompositionError(f"clients also send {names}, which is not masked\n  try       strategy=fedavg")
        size = self.cohort_size(strategy, num_clients)
        encoding = MaskedEncoding(self.fixed_point(size), self.clip_norm, self.flatten, self.noisy_sum(size))
        stage = Stage(
            client=Transform(update=encoding.encode, init=encoding.init_client),
            server=Transform(update=encoding.unrotate, init=encoding.init_server),
            has_norm_bound=True,
            needs_sum=True,
        )
        total = integer_mean(
            encoding.fixed_point,
            threshold=self.threshold_of(size),
            denominator=size if self.noise else None,
            full_protocol=self.protocol == "full",
        )
        return replace(strategy, stages=(*strategy.stages, stage), aggregate=total)

    def cohort_size(self, strategy: Strategy, num_clients: int | None = None) -> int:
        """Return the largest number of clients per round.

        Raises:
            SettingError: The number is unknown.
        """
        law = strategy.select.law
        from_law = {"all": num_clients, "fixed_size": law.size}.get(law.kind) if law else None
        size = self.cohort or from_law
        if size is None:
            expected = "a number, because sums of an unknown number of clients could wrap around"
            raise SettingError("cohort", None, expected, "cohort=10")
        return int(size)

    def threshold_of(self, size: int) -> int:
        """Return the smallest number of parties in a sum that may be opened, for a cohort of ``size`` clients.

        The default is the smallest number above ``(parties + 1) / 2``. Then a server that deviates from the protocol
        and one colluding party cannot make the other parties open two different sums.

        Raises:
            SettingError: ``threshold`` is not more than half of the parties, or is above their number.
        """
        parties = min(size, self.num_parties or size)
        threshold = (parties + 1) // 2 + 1 if self.threshold is None else self.threshold
        ok = is_count(threshold) and parties / 2 < threshold <= parties and threshold > 1
        kind = "the cohort of" if parties == size else "the nodes, at most"
        expected = f"null, or a whole number above half of {kind} {parties}, and at most {parties}"
        require(ok, "threshold", self.threshold, expected, "threshold=null")
        return threshold

    def fixed_point(self, size: int) -> FixedPoint:
        """Return the encoding of real numbers as integers, for cohorts of ``size``."""
        release = self.noisy_sum(size)
        std = release.std * sqrt(size) if release else 0.0
        bound = self.clip_norm / self.flatten
        return FixedPoint(bound=bound, bits=self.bits, modulus_bits=self.modulus_bits, max_clients=size, noise_std=std)

    def encoding_digest(self, size: int) -> bytes:
        """Return the digest of all settings on which the integers of a client depend, for cohorts of ``size``."""
        encoding = MaskedEncoding(self.fixed_point(size), self.clip_norm, self.flatten, self.noisy_sum(size))
        return sha256(repr((encoding, self.threshold_of(size))).encode()).digest()

    @property
    def norm(self) -> float:
        """L2 bound on the integers of one client, before the noise."""
        return float(ROUNDING_SLACK * self.flatten * (2 ** (self.bits - 1) - 1))

    def noisy_sum(self, size: int) -> NoisySum | None:
        """Return the release of one round with cohorts of ``size``; None without noise.

        Raises:
            SettingError: The noise of a client is below one integer, or too large to sample.
        """
        if self.noise is None:
            return None
        std = self.smallest_noisy_sum(size).std
        expected = f"a value with client noise between 1 and {MAX_STD:.0f} integers, now {std:.3g} standard deviation"
        fewer = ceil(log2(std / MAX_STD)) if std > 1 else floor(log2(std))
        require(1 <= std <= MAX_STD, "bits", self.bits, expected, f"bits={self.bits - fewer}")
        return self.smallest_noisy_sum(size)

    def smallest_noisy_sum(self, size: int) -> NoisySum:
        """Return the smallest sum of a cohort of ``size`` that may be opened, also if its noise cannot be sampled.

        Each of its parties contributes the noise of at least one client.
        """
        threshold = self.threshold_of(size)
        std = self.noise_multiplier * self.norm / sqrt(threshold)
        return NoisySum(kind=self.noise or NOISES[0], std=std, norm=self.norm, min_clients=threshold, max_clients=size)


@dataclass(frozen=True)
class MaskedEncoding:
    """Encoding of float updates as integers, and the inverse of the rotation for the mean.

    Attributes:
        fixed_point: encoding of single numbers.
        clip_norm: L2 bound on an update, > 0.
        flatten: factor >= 1; above 1, updates are rotated.
        noisy_sum: sum with the noise of the clients; None for no noise.
    """

    fixed_point: FixedPoint
    clip_norm: float
    flatten: float
    noisy_sum: NoisySum | None

    def encode(self, update: Array, state: State, context: Context) -> tuple[Array, State]:
        """Encode K x D floats as K x P unsigned integers; this is the client half of the stage."""
        x_KD = as_numpy(update)
        signs_P = _signs(context, x_KD.shape[1]) if self.flatten > 1 else None
        clients_K = context.clients_K.tolist()
        encoded = [  # row by row, because float64 and 64-bit integers of a whole block need four times its memory
            self.fixed_point.wrap(self._integers(x_D, signs_P, client, context))
            for x_D, client in zip(x_KD, clients_K, strict=True)
        ]
        return np.stack(encoded), state

    def unrotate(self, update: Array, state: State, context: Context) -> tuple[Array, State]:
        """Invert the rotation of the decoded mean; this is the server half of the stage."""
        if self.flatten == 1:
            return update, state
        length = int(state["length"])
        return unrotate(update, _signs(context, length), length).astype(np.float32), state

    def init_client(self, layout: Layout) -> State:
        """Return the empty state of a client, after a check of the model size.

        Raises:
            SettingError: The model is too large for ``bits`` or for ``flatten``.
        """
        if self.noisy_sum is None:
            return {}
        norm, length = self.noisy_sum.norm / ROUNDING_SLACK, layout.num_parameters
        length = next_power_of_two(length) if self.flatten > 1 else length
        fits = length / 4 + 5 * norm <= (ROUNDING_SLACK**2 - 1) * norm**2
        expected = f"more: rounding of {layout.num_parameters} parameters increases the norm of updates by over 1 %"
        require(fits, "privacy.bits", self.fixed_point.bits, expected, f"privacy.bits={self.fixed_point.bits + 2}")
        max_flatten = max_flattening(layout.num_parameters)
        is_flat = self.flatten == 1 or self.flatten <= max_flatten
        expected = (
            f"at most {max_flatten:.3g} for {layout.num_parameters} parameters, so that rotated updates are not clipped"
        )
        require(is_flat, "privacy.flatten", self.flatten, expected, "privacy.flatten=1")
        return {}

    def init_server(self, layout: Layout) -> State:
        """Return the server state: the length of an update before the padding, if there is a rotation."""
        self.init_client(layout)
        return {"length": np.array(layout.num_parameters)} if self.flatten > 1 else {}

    def _integers(self, x_D: np.ndarray, signs_P: np.ndarray | None, client: int, context: Context) -> np.ndarray:
        """Return the update of one client as signed integers, with noise."""
        x_D = clipped(require_finite(x_D), self.clip_norm)
        if signs_P is not None:
            x_D = rotate(x_D[None], signs_P)[0]
        if self.noisy_sum is None:
            return self.fixed_point.encode(x_D)
        seeded = {"round": context.round, "client": client}
        stream = (
            RandomStream.from_system()
            if context.deployed
            else RandomStream.from_seed(context.seed, Purpose.NOISE, **seeded)
        )
        rounded_D = conditional_round(self.fixed_point.scale_values(x_D), norm=self.noisy_sum.norm, stream=stream)
        return rounded_D + draw_noise(self.noisy_sum.kind, self.noisy_sum.std, len(x_D), stream)


def integer_mean(
    fixed_point: FixedPoint, *, threshold: int, denominator: int | None = None, full_protocol: bool = False
) -> Aggregator:
    """Return the aggregator of updates that are integers modulo a power of two; it computes their mean.

    Args:
        fixed_point: encoding of real numbers as integers.
        threshold: smallest number of updates in a mean; the number of parties is not known here.
        denominator: divisor of the sum; None for the number of updates.
        full_protocol: if True, run the secure aggregation protocol instead of adding the integers.

    *Guarantees*: the sum is exact for any order of clients, any blocks and any merges of partial aggregates.
    ``finalize`` raises `SecAggAborted` below the threshold. With equal weights, one client moves the mean by at most
    ``2 clip / cohort``.
    """

    def add(state: State, updates: Updates) -> State:
        rows_KD = as_numpy(updates.delta_KD)
        if full_protocol:
            clients = updates.clients_K.tolist()
            return {"rows": {**state["rows"], **dict(zip(clients, rows_KD, strict=True))}}
        total_D = rows_KD.sum(axis=0, dtype=fixed_point.dtype)
        total_D = total_D if state["total"] is None else state["total"] + total_D
        return partial_sum(total_D, state["count"] + len(updates))

    def merge(first: State, second: State) -> State:
        if full_protocol:
            return {"rows": {**first["rows"], **second["rows"]}}
        totals = [state["total"] for state in (first, second) if state["total"] is not None]
        total_D = np.sum(totals, axis=0, dtype=fixed_point.dtype) if totals else None
        return {"total": total_D, "count": first["count"] + second["count"]}

    def finalize(state: State) -> Array:
        count = len(state["rows"]) if full_protocol else state["count"]
        if not threshold <= count <= fixed_point.max_clients:
            raise SecAggAborted("mask", f"{count} clients responded, expected {threshold} to {fixed_point.max_clients}")
        total_D = _run_protocol(state["rows"], threshold) if full_protocol else state["total"]
        return (fixed_point.decode(total_D) / (denominator or count)).astype(np.float32)

    return Aggregator(
        init=lambda layout: {"rows": {}} if full_protocol else {"total": None, "count": 0},
        add=add,
        finalize=finalize,
        sensitivity=lambda clip, cohort: 2 * clip / cohort,
        is_sum=True,
        merge=merge,
    )


def partial_sum(total_D: np.ndarray, count: int) -> State:
    """Return the partial aggregate of an `integer_mean`, from a sum that the protocol opened on real nodes.

    Args:
        total_D: sum modulo a power of two, unsigned integers, ``(D,)``.
        count: number of updates in the sum.
    """
    return {"total": total_D, "count": count}


def _run_protocol(rows: Mapping[int, np.ndarray], threshold: int) -> np.ndarray:
    """Return the sum from the real protocol, among clients in memory."""
    in_memory = _import_protocol()
    clients, registered = in_memory.create_clients(rows)
    first_D = next(iter(rows.values()))
    session = in_memory.create_session(first_D[None], rows, threshold=threshold, round=1, run=b"simulated")
    total: np.ndarray = in_memory.run_protocol(session, clients, registered, rows).sum
    return total


def _import_protocol() -> Any:
    try:
        from fedlearn.privacy.secagg import in_memory
    except ImportError as missing:
        raise MissingExtra("the protocol of secure aggregation", "privacy") from missing
    return in_memory


def _signs(context: Context, length: int) -> np.ndarray:
    """Return the signs of the rotation of this round. They are public."""
    return RandomStream.from_seed(context.seed, Purpose.MASKS, round=context.round).signs(next_power_of_two(length))


def _refuse_unless_equal(strategy: Strategy) -> None:
    if not strategy.aggregate.is_sum or strategy.aggregate.sensitivity is None:
        raise CompositionError(
            "secure aggregation needs equally weighted updates, because the server cannot weight or sort masked ones\n"
            "  try       strategy.weighting=equal"
        )
