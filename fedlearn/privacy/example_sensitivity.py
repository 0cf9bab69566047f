"""Measure the influence of one example on DP-SGD, through the public methods of a trainer.

Shapes: N examples, D parameters.

A step without noise returns the sum of the clipped gradients of its batch. The Poisson batches of one client and one
round are nested: a larger ``batch_size`` keeps all examples of a smaller batch and adds further examples. So two steps
that differ only in ``batch_size`` return the sums with and without an example, with the same random numbers. DP-SGD
promises that this example moves the sum by at most the clip norm C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf, isfinite

import numpy as np

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.arrays import as_numpy, holds_whole_numbers
from fedlearn.core.inputs import input_arrays, map_fields
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientWork, ExampleDP, Examples, LocalSettings, Request, Updates
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.loop.protocols import Trainer

CLIENT = 1_000_000  # an id that no data set has, so each trainer uses the examples of the request
TOLERANCE = 0.02  # accepted excess in clip norms: far above rounding, far below the effect of mixed examples
TIGHT_CLIP = 1e-3  # clip norm of the measurement; almost all gradients exceed it, so the bound is tight
NUM_EXAMPLES = 10
MAX_EXAMPLES = 40  # largest client; a batch as long as a sequence needs as many examples
OUTLIER_SCALE = 10.0  # factor of the inputs of outliers
MIN_VMAP_CLIENTS = 64  # block size at which a trainer that can train clients together does so


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Largest movement of the clipped sum by one example.

    Attributes:
        movement: the largest movement, in multiples of the clip norm; at most 1 for sound DP-SGD.
        case: description of the two batches with the largest movement.
        num_pairs: number of compared pairs of batches.
    """

    movement: float
    case: str
    num_pairs: int

    @property
    def is_bounded(self) -> bool:
        """True if no example moves the sum by more than the clip norm, up to `TOLERANCE`."""
        return self.movement <= 1 + TOLERANCE


def measure_sensitivity(
    trainer: Trainer, examples: Examples, *, seed: int = 1, rounds: Sequence[int] = (1, 2), is_quick: bool = False
) -> Sensitivity:
    """Return the largest movement of the clipped sum by one example, at initial and at perturbed parameters.

    Some batches are as long as an axis of the input, because a layer can confuse this axis with the examples. If the
    trainer can train clients together, it is also measured in that way.

    Args:
        trainer: a trainer with DP-SGD.
        examples: N >= 2 examples; at most `MAX_EXAMPLES` are used.
        seed: seed of parameters, batches and random layers.
        rounds: rounds that draw the batches and the random layers.
        is_quick: True for fewer sizes of batches and one way of training. JAX compiles one program per size.

    Raises:
        FedlearnError: The trainer refuses DP-SGD for this model, or fails for a batch.
    """
    sizes = _batch_sizes(examples, is_quick=is_quick)
    examples = with_outliers(Examples(examples.x[: sizes[-1]], examples.y[: sizes[-1]]))
    init_D = trainer.init(seed)
    points = (("initial", init_D), ("perturbed", perturb(init_D, trainer.layout, seed=seed)))
    worst, case, num_pairs = 0.0, "no pair of batches", 0
    for variant in [trainer] if is_quick else _variants(trainer):
        for number, (point, params_D) in product(rounds, points):
            step = _Step(variant, params_D, clip=TIGHT_CLIP, seed=seed, round=number)
            pairs = [*_nested_pairs(step, examples, sizes), *_removals(step, examples)]
            num_pairs += len(pairs)
            moved, text = max(pairs, default=(0.0, ""))
            if moved > worst:
                worst, case = moved, f"{text}, {point} parameters"
    return Sensitivity(movement=worst, case=case, num_pairs=num_pairs)


def untrained_leaves(trainer: Trainer, examples: Examples, *, private: bool, seed: int = 1) -> tuple[str, ...]:
    """Return the names of the parameters whose gradient is zero on a batch, at perturbed parameters.

    The perturbation matters for LoRA: its first factor has a zero gradient while the second factor is zero.

    Args:
        trainer: the trainer.
        examples: a batch; it should contain several classes.
        private: True for the clipped sum of DP-SGD without noise, False for plain training.
        seed: seed of the parameters.
    """
    params_D = perturb(trainer.init(seed), trainer.layout, seed=seed)
    step = _Step(trainer, params_D, clip=TIGHT_CLIP if private else None, seed=seed, round=1)
    sum_D, _ = step(examples, len(examples))
    gradients = trainer.layout.unpack(sum_D)
    return tuple(leaf.name for leaf in trainer.layout.trainable.leaves if not np.any(gradients[leaf.name]))


def perturb(params_D: np.ndarray, layout: Layout, *, seed: int) -> np.ndarray:
    """Return the parameters plus Gaussian noise of a tenth of the scale of each parameter. Buffers stay as they are."""
    moved_D = np.array(params_D, np.float32)
    rng = generator(seed, Purpose.CANARIES)
    for leaf in layout.trainable.leaves:
        part = layout.slices[leaf.name]
        scale = 0.1 * (float(np.std(moved_D[part])) or 1.0)
        moved_D[part] += (scale * rng.standard_normal(leaf.size)).astype(np.float32)
    return moved_D


@dataclass(frozen=True)
class _Step:
    """One step of local training without noise, as a function ``(examples, batch_size) -> (sum_D, num_used)``."""

    trainer: Trainer
    params_D: np.ndarray
    clip: float | None  # None for plain training
    seed: int
    round: int

    def __call__(self, examples: Examples, batch_size: int, *, deployed: bool = False) -> tuple[np.ndarray, int]:
        scale = 1.0 if self.clip is None else 1 / self.clip  # steps of the scale of the parameters lose no digits
        dp = None if self.clip is None else ExampleDP(clip=self.clip, noise_multiplier=0.0)
        local = LocalSettings(steps=1, batch_size=batch_size, learning_rate=scale * batch_size, example_dp=dp)
        request = Request(round=self.round, seed=self.seed, params_D=self.params_D, local=local, deployed=deployed)
        updates = self._fit(request, ClientWork(client=CLIENT, examples=examples))
        expected = min(batch_size, len(examples)) / batch_size  # the trainer divides by the expected batch
        sum_D = as_numpy(updates.delta_KD)[0].astype(np.float64) * (expected / -scale)
        return sum_D, int(updates.metrics["loss"].count_K[0])

    def _fit(self, request: Request, work: ClientWork) -> Updates:
        try:
            return self.trainer.fit(request, plain_training, [work])
        except FedlearnError:
            raise
        except Exception as error:
            size = min(request.local.batch_size, len(work.examples))
            fails = f"one that fails for a batch of {size} examples ({type(error).__name__}: {error})"
            expected = "a model that trains on batches of any size"
            raise SettingError("model", fails, expected, "a model without batch norm") from error

    def distance(self, first_D: np.ndarray, second_D: np.ndarray) -> float:
        """Return the L2 distance of two sums, in multiples of the clip norm."""
        assert self.clip is not None
        moved = float(np.linalg.norm(first_D - second_D)) / self.clip
        return moved if isfinite(moved) else inf


def _nested_pairs(step: _Step, examples: Examples, sizes: Sequence[int]) -> Iterator[tuple[float, str]]:
    """Yield the movement per added example for nested batches of neighbouring sizes."""
    for smaller, larger in pairwise(sizes):
        if larger != smaller + 1:
            continue
        (first_D, few), (second_D, many) = step(examples, smaller), step(examples, larger)
        moved = step.distance(first_D, second_D)
        yield moved / max(1, many - few), f"batches of {few} and {many} examples"


def _removals(step: _Step, examples: Examples) -> Iterator[tuple[float, str]]:
    """Yield the movement by the removal of one example from a full batch of a real client.

    Real clients draw secret random numbers. If two equal requests then give different sums, removals cannot be
    compared, and none is yielded.
    """
    whole_D, count = step(examples, len(examples), deployed=True)
    again_D, _ = step(examples, len(examples), deployed=True)
    if step.distance(whole_D, again_D) > TOLERANCE:
        return
    for n in {0, len(examples) // 2}:
        rows = np.arange(len(examples)) != n
        rest_D, left = step(Examples(examples.x[rows], examples.y[rows]), len(examples), deployed=True)
        yield step.distance(whole_D, rest_D), f"a full batch of {count} examples, and {left} without example {n}"


def _variants(trainer: Trainer) -> Iterator[Trainer]:
    """Yield the trainer, and a trainer that trains clients together if the run can use it."""
    yield trainer
    if "vmap" not in trainer.describe_batching(MIN_VMAP_CLIENTS, MIN_VMAP_CLIENTS * NUM_EXAMPLES):
        return
    try:
        together = trainer.with_batching("vmap")
    except SettingError:
        return
    if trainer.describe_batching(1, NUM_EXAMPLES) != "vmap":
        yield together


def _batch_sizes(examples: Examples, *, is_quick: bool) -> list[int]:
    """Return batch sizes, ascending: some pairs of neighbours, and the sizes around each axis of the input."""
    most, shapes = min(len(examples), MAX_EXAMPLES), [np.shape(part) for part in input_arrays(examples.x)]
    axes = sorted({length for shape in shapes for length in shape[1:-1] or shape[1:] if 2 <= length < most})
    if is_quick:
        return [axes[0] - 1, axes[0]] if axes else [max(1, most - 1), most]
    around = {length + shift for length in axes[:2] for shift in (-1, 0, 1)}
    return sorted({min(size, most) for size in {1, 2, 3, 4, 5, NUM_EXAMPLES - 1, NUM_EXAMPLES, *around}})


def sample_examples(parts: Sequence[Examples], count: int, *, seed: int) -> Examples:
    """Return ``count`` examples of several clients at random, or all examples if there are fewer."""
    x, y = (np.concatenate([np.asarray(getattr(part, name)) for part in parts]) for name in ("x", "y"))
    rows = generator(seed, Purpose.CANARIES, client=1).permutation(len(y))[:count]
    return Examples(x[rows], y[rows])


def with_outliers(examples: Examples) -> Examples:
    """Return the examples with every third input enlarged and every third target exchanged.

    If a layer mixes the examples of a batch, an outlier changes the gradients of all other examples.
    """
    x, y, n = np.array(examples.x), np.array(examples.y), np.arange(len(examples))

    def enlarge(part: np.ndarray) -> np.ndarray:
        if not holds_whole_numbers(part):
            part[n % 3 == 0] *= OUTLIER_SCALE
        return part

    x = map_fields(enlarge, x)
    y[n % 3 == 1] = np.roll(y, 1)[n % 3 == 1]
    return Examples(x, y)
