"""Masked updates: a strategy works on integers of which the server sees the sum only.

Shapes: K clients in a block, D parameters laid flat, P of them after padding to a power of two for a rotation.

A client's update is clipped, scaled and rounded to integers modulo a power of two; sums of these are exact, so that
neither engine nor order nor block size shows in the result. On real nodes the integers travel through the protocol of
`fedlearn.privacy.secagg`; in a simulation, where masks would cancel anyway, they are added up, unless
``protocol="full"`` asks for the real thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
ROUNDING_SLACK = 1.01  # what random rounding may add to the norm; the noise is sized for it


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The settings of masked updates; ``protect`` applies them to a strategy.

    `fedlearn.privacy.mechanisms.secure_aggregation.secagg` and ``distributed`` make it and explain the settings.

    Raises:
        SettingError: a setting is out of range, or sums could wrap around.
        MissingExtra: the cryptography for ``protocol=full`` or for noise is not installed.
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

    def __post_init__(self) -> None:
        if self.noise is not None:
            self._check_noise()
        known = self.protocol in PROTOCOLS
        require(known, "protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}", "protocol=sum")
        given = self.cohort is None or is_count(self.cohort, at_least=2)
        require(given, "cohort", self.cohort, "null, or a whole number >= 2", "cohort=null")
        positive = is_number(self.clip_norm, at_least=0) and 0 < self.clip_norm < float("inf")
        require(positive, "clip_norm", self.clip_norm, "a finite number > 0", "clip_norm=1.0")
        FixedPoint(bound=self.clip_norm, bits=self.bits, modulus_bits=self.modulus_bits, max_clients=self.cohort or 1)
        if self.cohort:
            self.threshold_of(self.cohort)
        if self.protocol == "full":
            _drill()

    def _check_noise(self) -> None:
        positive = is_number(self.noise_multiplier, at_least=0) and 0 < self.noise_multiplier < float("inf")
        require(positive, "noise_multiplier", self.noise_multiplier, "a finite number > 0", "noise_multiplier=1.0")
        require(self.noise in NOISES, "noise", self.noise, f"one of {', '.join(NOISES)}", "noise=skellam")
        flat = is_number(self.flatten, at_least=1) and self.flatten < float("inf")
        require(flat, "flatten", self.flatten, "a number >= 1", "flatten=1")
        RandomStream.from_system()  # a missing package is told now

    def protect(self, strategy: Strategy, *, num_clients: int | None = None) -> Strategy:
        """The strategy with masked updates.

        Args:
            strategy: one whose update is an equally weighted mean.
            num_clients: in all, if it is known: the cohort of a strategy that asks everyone.

        Raises:
            CompositionError: the strategy does not take equally weighted means, or its clients send other vectors too.
            SettingError: sums of its cohorts could wrap around, or the threshold does not suit them.
        """
        _refuse_unless_equal(strategy)
        names = ", ".join(extra_names(strategy.local))
        if names:
            raise CompositionError(
                f"clients also send {names}, which would leave unmasked\n  try       strategy=fedavg"
            )
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
        """Clients that a round asks, at most."""
        law = strategy.select.law
        asked = {"all": num_clients, "fixed_size": law.size}.get(law.kind) if law else None
        size = self.cohort or asked
        if size is None:
            expected = "a number: sums of an unknown number of clients could wrap around"
            raise SettingError("cohort", None, expected, "cohort=10   (or strategy.clients_per_round=10)")
        return int(size)

    def threshold_of(self, size: int) -> int:
        """The fewest clients whose sum may be opened, of a cohort of ``size``."""
        threshold = size // 2 + 1 if self.threshold is None else self.threshold
        ok = is_count(threshold) and size / 2 < threshold <= size and threshold > 1
        expected = f"null, or a whole number above half of the cohort of {size}, and at most {size}"
        require(ok, "threshold", self.threshold, expected, "threshold=null")
        return threshold

    def fixed_point(self, size: int) -> FixedPoint:
        """How numbers become integers, for cohorts of ``size``."""
        release = self.noisy_sum(size)
        std = release.std * sqrt(size) if release else 0.0
        bound = self.clip_norm / self.flatten
        return FixedPoint(bound=bound, bits=self.bits, modulus_bits=self.modulus_bits, max_clients=size, noise_std=std)

    @property
    def norm(self) -> float:
        """L2 bound on one client's integers, before the noise."""
        return float(ROUNDING_SLACK * self.flatten * (2 ** (self.bits - 1) - 1))

    def noisy_sum(self, size: int) -> NoisySum | None:
        """What one round with cohorts of ``size`` releases; None without noise: nothing is promised of the sum then."""
        if self.noise is None:
            return None
        std = self.smallest_noisy_sum(size).std
        expected = f"so that each client's noise, now of deviation {std:.3g}, is between 1 and {MAX_STD:.0f} integers"
        fewer = ceil(log2(std / MAX_STD)) if std > 1 else floor(log2(std))
        require(1 <= std <= MAX_STD, "bits", self.bits, expected, f"bits={self.bits - fewer}")
        return self.smallest_noisy_sum(size)

    def smallest_noisy_sum(self, size: int) -> NoisySum:
        """The smallest sum of a cohort of ``size`` that may be opened, whether or not its noise can be drawn."""
        quorum = self.threshold_of(size)
        std = self.noise_multiplier * self.norm / sqrt(quorum)
        return NoisySum(kind=self.noise or NOISES[0], std=std, norm=self.norm, min_clients=quorum, max_clients=size)


@dataclass(frozen=True)
class MaskedEncoding:
    """From a float update to masked integers, and back from their mean.

    Attributes:
        fixed_point: of single numbers.
        clip_norm: L2 bound on an update.
        flatten: above 1, updates are rotated.
        noisy_sum: the noise that a client adds, or None.
    """

    fixed_point: FixedPoint
    clip_norm: float
    flatten: float
    noisy_sum: NoisySum | None

    def encode(self, update: Array, state: State, context: Context) -> tuple[Array, State]:
        """The client half: K x D floats to K x P unsigned integers."""
        x_KD = as_numpy(update)
        signs_P = _signs(context, x_KD.shape[1]) if self.flatten > 1 else None
        clients_K = context.clients_K.tolist()
        sent = [  # row by row: float64 and 64-bit integers of a whole block would take four times its memory
            self.fixed_point.wrap(self._integers(x_D, signs_P, client, context))
            for x_D, client in zip(x_KD, clients_K, strict=True)
        ]
        return np.stack(sent), state

    def unrotate(self, update: Array, state: State, context: Context) -> tuple[Array, State]:
        """The server half, on the decoded mean."""
        if self.flatten == 1:
            return update, state
        length = int(state["length"])
        return unrotate(update, _signs(context, length), length).astype(np.float32), state

    def init_client(self, layout: Layout) -> State:
        """Refuse a model too large for the bits; nothing to remember at clients."""
        if self.noisy_sum is None:
            return {}
        norm, length = self.noisy_sum.norm / ROUNDING_SLACK, layout.num_parameters
        length = next_power_of_two(length) if self.flatten > 1 else length
        roomy = length / 4 + 5 * norm <= (ROUNDING_SLACK**2 - 1) * norm**2
        expected = f"more: rounding a model of {layout.num_parameters} parameters would lengthen updates by over 1 %"
        require(roomy, "privacy.bits", self.fixed_point.bits, expected, f"privacy.bits={self.fixed_point.bits + 2}")
        most = max_flattening(layout.num_parameters)
        flat = self.flatten == 1 or self.flatten <= most
        expected = f"at most {most:.3g} for {layout.num_parameters} parameters: more would cut off rotated updates"
        require(flat, "privacy.flatten", self.flatten, expected, "privacy.flatten=1")
        return {}

    def init_server(self, layout: Layout) -> State:
        """How long updates are before the rotation pads them."""
        self.init_client(layout)
        return {"length": np.array(layout.num_parameters)} if self.flatten > 1 else {}

    def _integers(self, x_D: np.ndarray, signs_P: np.ndarray | None, client: int, context: Context) -> np.ndarray:
        """One client's update, as signed integers with its noise."""
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
    """The mean of updates that are integers modulo a power of two.

    Args:
        fixed_point: what the integers mean.
        threshold: the fewest updates that give a result.
        denominator: what to divide by; None divides by the number of updates.
        full_protocol: run the protocol of secure aggregation on them, instead of adding them up.

    *Guarantees*: the sum is exact, whatever the order of clients, the blocks, and how folds are merged. ``done`` raises
    `SecAggAborted` below the threshold. With equal weights one client moves the mean by at most ``2 clip / cohort``.
    """

    def add(memory: State, updates: Updates) -> State:
        rows_KD = as_numpy(updates.delta_KD)
        if full_protocol:
            clients = updates.clients_K.tolist()
            return {"rows": {**memory["rows"], **dict(zip(clients, rows_KD, strict=True))}}
        total_D = rows_KD.sum(axis=0, dtype=fixed_point.dtype)
        total_D = total_D if memory["total"] is None else memory["total"] + total_D
        return partial_sum(total_D, memory["count"] + len(updates))

    def merge(one: State, other: State) -> State:
        if full_protocol:
            return {"rows": {**one["rows"], **other["rows"]}}
        totals = [memory["total"] for memory in (one, other) if memory["total"] is not None]
        total_D = np.sum(totals, axis=0, dtype=fixed_point.dtype) if totals else None
        return {"total": total_D, "count": one["count"] + other["count"]}

    def done(memory: State) -> Array:
        count = len(memory["rows"]) if full_protocol else memory["count"]
        if not threshold <= count <= fixed_point.max_clients:
            raise SecAggAborted(
                "mask", f"{count} clients delivered, where {threshold} to {fixed_point.max_clients} are due"
            )
        total_D = _opened(memory["rows"], threshold) if full_protocol else memory["total"]
        return (fixed_point.decode(total_D) / (denominator or count)).astype(np.float32)

    return Aggregator(
        init=lambda layout: {"rows": {}} if full_protocol else {"total": None, "count": 0},
        add=add,
        finalize=done,
        sensitivity=lambda clip, cohort: 2 * clip / cohort,
        is_sum=True,
        merge=merge,
    )


def partial_sum(total_D: np.ndarray, count: int) -> State:
    """The fold of an `integer_mean` whose sum of ``count`` updates was opened by the protocol, on real nodes."""
    return {"total": total_D, "count": count}


def _opened(rows: Mapping[int, np.ndarray], threshold: int) -> np.ndarray:
    """The sum, by the real protocol among clients in memory."""
    in_memory = _drill()
    clients, registered = in_memory.create_clients(rows)
    some = next(iter(rows.values()))
    session = in_memory.create_session(some[None], rows, threshold=threshold, round=1, run=b"simulated")
    total: np.ndarray = in_memory.run_protocol(session, clients, registered, rows).sum
    return total


def _drill() -> Any:
    try:
        from fedlearn.privacy.secagg import in_memory
    except ImportError as missing:
        raise MissingExtra("the protocol of secure aggregation", "privacy") from missing
    return in_memory


def _signs(context: Context, length: int) -> np.ndarray:
    """Of this round's rotation; everyone may know them."""
    return RandomStream.from_seed(context.seed, Purpose.MASKS, round=context.round).signs(next_power_of_two(length))


def _refuse_unless_equal(strategy: Strategy) -> None:
    if not strategy.aggregate.is_sum or strategy.aggregate.sensitivity is None:
        raise CompositionError(
            "only a sum of equally weighted updates can be masked: a server that sees nothing else cannot weight or "
            "sort them\n  try       strategy.weighting=equal"
        )
