"""Client-level differential privacy with noise that is correlated over rounds, without any assumption on sampling.

Shapes: D parameters, T rounds, B buffers.

Each model depends on the sum of all rounds before it. With independent noise, the sum over t rounds has t times the
variance of one round. Here the mechanism releases ``C x + xi``, for the sums x of the rounds and a lower triangular
T x T matrix C. Round t adds row t of ``C^-1 xi`` as noise. Later rounds cancel a part of this noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil, log2, sqrt
from typing import Any, NamedTuple

import numpy as np

from fedlearn.algorithm.aggregation import expected_mean
from fedlearn.algorithm.client_selection import min_separation
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context, Stage, Transform
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Event, EventHistory, Ledger, event_history
from fedlearn.core.records import Array, LocalSettings, State
from fedlearn.errors import FedlearnError, MissingExtra, SettingError, is_count, require
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.privacy.gaussian_noise import add_gaussian_noise, standard_normals
from fedlearn.privacy.mechanisms.base import (
    EVALUATION_NOT_COVERED,
    FAILURES_NOT_COVERED,
    Mechanism,
    NoiseCalibration,
    Population,
    delta_warnings,
    refuse_example_dp,
    refuse_extra_uploads,
    refuse_if,
    refuse_unequal_weights,
    replace_parts,
    require_clip_norm,
)
from fedlearn.privacy.mechanisms.central_dp import clip_finite

MATRICES = ("tree", "banded", "blt")


class NoiseCorrelation(NamedTuple):
    """A method to correlate noise over rounds.

    Attributes:
        num_buffers: B, the number of D-vectors in the server state.
        draw: ``(round, fresh_D, buffers_BD) -> (noise_D, buffers_BD)``, with unit scale.
        sensitivity: ``rounds -> float``; L2 sensitivity of the first ``rounds`` releases to one client, for a clip norm
            of 1.
    """

    num_buffers: int
    draw: Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    sensitivity: Callable[[int], float]


def ftrl(
    *,
    clip_norm: float = 1.0,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float = 1e-5,
    matrix: str = "banded",
    separation: int = 1,
    bands: int | None = None,
) -> Mechanism:
    """Return DP-FTRL: private training with correlated noise.

    ``delta_t = (sum_k clip(delta_k, C) + z C s (C_matrix^-1 xi)_t) / cohort``, with the sensitivity s of all T rounds.

    Cohorts need not be random. A client waits for ``separation`` rounds before it takes part again; the mechanism
    replaces the selector by one that enforces this.

    Args:
        clip_norm: C, the L2 bound on an update, > 0.
        noise_multiplier: z, > 0; the whole run costs as much as one Gaussian release with multiplier z. None for the
            smallest value that satisfies ``epsilon``.
        epsilon: budget; the run stops before it exceeds this. None for no limit.
        delta: in (0, 1), below 1 over the number of clients.
        matrix: ``tree`` (binary tree of partial sums), ``banded`` (Toeplitz with optimal coefficients) or ``blt``
            (buffered linear Toeplitz: two or three buffers instead of ``bands``). ``banded`` and ``blt`` need JAX and
            jax-privacy; ``tree`` needs neither.
        separation: rounds from one participation of a client to its next, >= 1.
        bands: number of bands for ``banded``, >= 2; None for the smaller of ``separation`` and the number of rounds.

    *Guarantees*: all models are (epsilon, delta)-private, with the values of the ledger. The adjacency is one client
    added or removed; the updates of a removed client count as zero. A run that stops early costs less, because the
    sensitivity of the first t rounds is smaller.

    References: Kairouz, McMahan, Song, Thakkar, Thakurta, Xu, *Practical and Private (Deep) Learning without Sampling
    or Shuffling*, ICML 2021, arXiv:2103.00039; Choquette-Choo et al., *(Amplified) Banded Matrix Factorization*,
    NeurIPS 2023, arXiv:2306.08153; McMahan, Xu, Zhang, *A Hassle-free Algorithm for Private Learning in Practice*,
    2024, arXiv:2408.08868.

    Raises:
        SettingError: A number is out of range, or is NaN.
    """
    require_clip_norm(clip_norm)
    budget = NoiseCalibration(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    require(matrix in MATRICES, "matrix", matrix, f"one of {', '.join(MATRICES)}", "matrix=tree")
    require(is_count(separation), "separation", separation, "a whole number of rounds >= 1", "separation=10")
    fits = bands is None or is_count(bands, at_least=2)
    require(fits, "bands", bands, "null, or a whole number >= 2", "bands=8")
    settings = FtrlSettings(clip_norm=clip_norm, calibration=budget, matrix=matrix, separation=separation, bands=bands)
    return Mechanism(validate=_refuse, protect=partial(_protect, settings), kind="ftrl")


@dataclass(frozen=True, kw_only=True)
class FtrlSettings:
    """The checked arguments of `ftrl`."""

    clip_norm: float
    calibration: NoiseCalibration
    matrix: str
    separation: int
    bands: int | None


def noise_correlation(matrix: str, *, rounds: int, separation: int, bands: int | None = None) -> NoiseCorrelation:
    """Return tree aggregation, or a matrix that jax-privacy optimizes for the planned rounds.

    Args:
        matrix: ``tree``, ``banded`` or ``blt``.
        rounds: number of planned rounds, >= 1.
        separation: rounds from one participation of a client to its next, >= 1.
        bands: number of bands for ``banded``; None for the default of `ftrl`.

    Raises:
        MissingExtra: ``matrix`` is ``banded`` or ``blt``, and jax-privacy is not installed.
    """
    if matrix == "tree":
        return _tree(rounds, separation)
    if matrix == "blt":
        return _buffered_toeplitz(rounds, separation)
    width = min(max(2, bands or separation), rounds)
    return toeplitz_correlation(_optimal_bands(rounds, width), separation)


def toeplitz_correlation(coefficients: np.ndarray, separation: int) -> NoiseCorrelation:
    """Return the noise ``C^-1 xi`` of a banded lower triangular Toeplitz matrix C.

    Args:
        coefficients: first entries of the first column of C; the other entries are 0.
        separation: rounds from one participation of a client to its next, >= 1.
    """
    coefficients = np.asarray(coefficients, np.float64)
    num_buffers = len(coefficients) - 1

    def draw(round: int, fresh_D: np.ndarray, buffers_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise_D = (fresh_D - coefficients[1:] @ buffers_BD) / coefficients[0]
        return noise_D, np.concatenate([noise_D[None], buffers_BD])[:num_buffers]

    return NoiseCorrelation(num_buffers, draw, partial(toeplitz_sensitivity, coefficients, separation))


def toeplitz_sensitivity(coefficients: np.ndarray, separation: int, rounds: int) -> float:
    """Return the largest norm of ``C u`` over participations u that are at least ``separation`` rounds apart.

    If the coefficients are >= 0 and do not increase, the maximum is at the rounds 1, 1 + separation, ...

    Raises:
        FedlearnError: The coefficients are negative or increase.

    Reference: Kalinin, Lampert, *Banded Square Root Matrix Factorization for Differentially Private Model Training*,
    NeurIPS 2024, arXiv:2405.13763, Theorem 2.
    """
    if np.any(coefficients < 0) or np.any(np.diff(coefficients) > 0):
        raise FedlearnError("the coefficients of a Toeplitz matrix must be >= 0 and must not increase")
    column = np.zeros(rounds)
    column[: len(coefficients)] = coefficients[:rounds]
    moved = sum(np.concatenate([np.zeros(start), column[: rounds - start]]) for start in range(0, rounds, separation))
    return float(np.linalg.norm(moved))


def _tree(rounds: int, separation: int) -> NoiseCorrelation:
    """Return tree aggregation. Prefix t has the noise of the tree nodes that are the binary digits of t."""
    height = ceil(log2(rounds + 1))

    def draw(round: int, fresh_D: np.ndarray, buffers_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        level = (round & -round).bit_length() - 1  # round t completes this node, which replaces the nodes below it
        after_BD = buffers_BD.copy()
        after_BD[:level], after_BD[level] = 0, fresh_D
        return fresh_D - buffers_BD[:level].sum(axis=0), after_BD

    return NoiseCorrelation(height, draw, partial(tree_sensitivity, separation))


def tree_sensitivity(separation: int, rounds: int) -> float:
    """Return an upper bound on the L2 sensitivity of the tree nodes that the first ``rounds`` rounds release.

    Round t releases one node, the sum of the last ``2^l`` rounds. The level l is the number of trailing zeros of t. A
    client that takes part c times in these rounds moves the node by at most c. The bound adds the largest sum of
    squares of each level. It is 0 to 20 % above brute force over all patterns of participation.
    """
    total = 0
    for level in range(rounds.bit_length()):
        blocks = rounds >> level
        total += _largest_squares(separation, level, 2 ** (blocks - 1).bit_length())[blocks - 1]
    return sqrt(total)


@lru_cache(maxsize=256)
def _largest_squares(separation: int, level: int, num_blocks: int) -> tuple[int, ...]:
    """Return the largest sum of squared moves of the nodes of a level, for 1 to ``num_blocks`` blocks of rounds.

    The blocks 1, 3, 5, ... of ``2^level`` rounds are the nodes of this level. For each number of rounds that a client
    still waits at the end of a block, ``best`` has the largest sum. The client takes part as early as it can, because a
    shorter wait never excludes a pattern. A longer wait is kept only for a larger sum.
    """
    length, best, sums = 2**level, {0: 0}, []
    for block in range(1, num_blocks + 1):
        after: dict[int, int] = {}
        for wait, total in best.items():
            for times in range(max(0, ceil((length - wait) / separation)) + 1):
                left, square = max(0, wait + times * separation - length), times**2 if block % 2 else 0
                after[left] = max(after.get(left, 0), total + square)
        best, largest = {}, -1
        for left in sorted(after):
            if after[left] > largest:
                best[left] = largest = after[left]
        sums.append(largest)
    return tuple(sums)


def _buffered_toeplitz(rounds: int, separation: int) -> NoiseCorrelation:
    matrix = _optimal_buffers(rounds, separation)
    decay_B1, scale_B = np.asarray(matrix.buf_decay, np.float64)[:, None], np.asarray(matrix.output_scale, np.float64)
    powers_BT = decay_B1 ** np.arange(rounds - 1)
    coefficients = np.concatenate([[1.0], scale_B @ powers_BT])

    def draw(round: int, fresh_D: np.ndarray, buffers_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise_D = fresh_D - scale_B @ buffers_BD
        return noise_D, decay_B1 * buffers_BD + noise_D

    return NoiseCorrelation(len(scale_B), draw, partial(toeplitz_sensitivity, coefficients, separation))


def _optimal_bands(rounds: int, bands: int) -> np.ndarray:
    """Return the coefficients with the least mean error over prefix sums.

    The optimizer's last digits may increase, so the coefficients are made monotone.
    """
    factorization = _matrix_factorization()
    coefficients = np.asarray(factorization.toeplitz.optimize_banded_toeplitz(n=rounds, bands=bands), np.float64)
    return np.minimum.accumulate(np.maximum(coefficients, 0.0))


def _optimal_buffers(rounds: int, separation: int) -> Any:
    """Return the buffers with the least maximal error over prefix sums.

    Up to 200 rounds two buffers are used: a third one gains less than 1 % and costs time.
    """
    times, buffers = ceil(rounds / separation), 2 if rounds <= 200 else 3
    return _matrix_factorization().buffered_toeplitz.optimize(
        n=rounds,
        min_sep=separation,
        max_participations=times,
        error="max",
        min_buffers=buffers,
        max_buffers=buffers,
    )


def _matrix_factorization() -> Any:
    try:
        from jax_privacy import matrix_factorization
        from jax_privacy.matrix_factorization import buffered_toeplitz, toeplitz  # noqa: F401
    except ImportError as missing:
        raise MissingExtra("privacy.matrix=banded or blt (privacy.matrix=tree needs no JAX)", "ftrl") from missing
    return matrix_factorization


def _refuse(strategy: Strategy, local: LocalSettings) -> None:
    refuse_example_dp(local, "ftrl")
    refuse_unequal_weights(strategy, "ftrl")
    refuse_extra_uploads(strategy, "ftrl")
    law = strategy.select.law
    known = law is not None and law.kind in ("all", "fixed_size", "min_separation")
    reason = "privacy=ftrl replaces the selector by cohorts of a fixed size, but this selector has no fixed size"
    refuse_if(not known, reason, "a strategy with clients_per_round")


def _protect(
    settings: FtrlSettings, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    law, rounds, separation = strategy.select.law, population.rounds, settings.separation
    assert law is not None
    cohort = int(population.num_clients if law.kind == "all" else law.size or 0)
    max_cohort = population.num_clients // separation
    name = "strategy.clients_per_round"
    expected = (
        f"at most {max_cohort}, because one in {separation} of the {population.num_clients} clients may take part"
    )
    if cohort > max_cohort:
        raise SettingError(
            name, cohort, expected, f"{name}={max_cohort}" if max_cohort else "a smaller privacy.separation"
        )

    def planned(noise: float) -> list[EventHistory]:
        return [event_history({Event(noise): 1})]

    noise = settings.calibration.resolve_noise_multiplier(planned)
    correlated = noise_correlation(settings.matrix, rounds=rounds, separation=separation, bands=settings.bands)
    stage = _stage(settings.clip_norm, noise, cohort, correlated, rounds)
    return replace_parts(
        strategy,
        select=min_separation(cohort, separation),
        stages=(*strategy.stages, stage),
        aggregate=expected_mean(cohort),
        privacy_guarantee=_guarantee(settings, noise, correlated, population),
    ), local


def _stage(clip_norm: float, noise: float, cohort: int, correlated: NoiseCorrelation, rounds: int) -> Stage:
    std = noise * correlated.sensitivity(rounds) * clip_norm / cohort

    def clip(update: Array, state: State, context: Context) -> tuple[Array, State]:
        return clip_finite(update, clip_norm), state

    def add_noise(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        if context.round > rounds or not np.isclose(float(state["std"][0]), std, rtol=1e-6):
            reason = f"the run was planned for another number of rounds than {rounds}, on which the noise depends"
            raise FedlearnError(f"privacy=ftrl: {reason}\n  advice    the number of rounds at the start of the run")
        fresh_D = standard_normals(update_D.shape, context)
        noise_D, buffers_BD = correlated.draw(context.round, fresh_D, np.asarray(state["buffers"]))
        return add_gaussian_noise(update_D, noise_D, std), {**state, "buffers": buffers_BD}

    def init(layout: Layout) -> State:
        return {"buffers": np.zeros((correlated.num_buffers, layout.num_parameters)), "std": np.array([std])}

    server = Transform(update=add_noise, init=init)
    return Stage(
        client=Transform(update=clip), server=server, event=Event(noise), is_nonexpansive=True, has_norm_bound=True
    )


def _guarantee(
    settings: FtrlSettings, noise: float, correlated: NoiseCorrelation, population: Population
) -> PrivacyGuarantee:
    delta, whole = settings.calibration.delta, correlated.sensitivity(population.rounds)

    def charge(ledger: Ledger, release: Release) -> Ledger:
        """Replace all events by one Gaussian release, with the smaller sensitivity of the rounds so far."""
        return ledger.replace_federation(Event(noise * whole / correlated.sensitivity(release.round)))

    return PrivacyGuarantee(
        charge=charge,
        epsilon_of=lambda ledger: max_epsilon_bounds([ledger.federation], delta=delta),
        max_epsilon=settings.calibration.epsilon,
        kind="ftrl",
        unit="client",
        adjacency="one client added or removed",
        sampling=f"none assumed; a client waits {settings.separation} rounds, which the selector enforces",
        delta=delta,
        noise_multiplier=noise,
        clip_norm=settings.clip_norm,
        clip="fixed",
        settings={"matrix": settings.matrix},
        not_covered=(
            EVALUATION_NOT_COVERED,
            FAILURES_NOT_COVERED,
            "a server that reads single updates before it adds them",
        ),
        warnings=tuple(delta_warnings(delta, population.num_clients)),
    )
