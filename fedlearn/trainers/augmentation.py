"""Training images that are flipped, shifted and rotated anew in every round.

Shapes: N images of H x W pixels and C channels, K clients in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientWork, Examples, Request, Updates
from fedlearn.errors import is_number, require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.wrappers import TrainerWrapper
from fedlearn.trainers.batching import round_of

CHUNK_SIZE = 256  # images that are distorted together: their pixels stay in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Set the augmentation of training images.

    Args:
        flip: left to right, for every other image.
        shift: pixels at most, in each of four directions: a crop from an image with a black border.
        rotation: degrees at most, either way.
    """

    flip: bool = True
    shift: int = 4
    rotation: float = 15.0

    def __post_init__(self) -> None:
        counts = isinstance(self.shift, int) and self.shift >= 0
        require(counts, "shift", self.shift, "a whole number of pixels >= 0", "shift=4")
        turns = is_number(self.rotation, at_least=0) and self.rotation <= 180
        require(turns, "rotation", self.rotation, "degrees in [0, 180]", "rotation=15")


class AugmentedTrainer(TrainerWrapper):
    """Wrap a trainer so that it gets the images of each client augmented, differently in each round.

    Args:
        trainer: of either framework, or mixed.
        augmentation: what may happen to an image.

    *Guarantees*: what happens to an image follows from (seed, round, client, row) alone and is worked out before any
    framework sees it, so that torch and JAX, all engines and a resumed run train on the same pixels. An image is
    distorted once a round, also where a round makes several passes. Evaluation sees images as they are. One image
    stays one image, so that DP-SGD protects it as before.
    """

    def __init__(self, trainer: Trainer, augmentation: Augmentation) -> None:
        super().__init__(trainer)
        self.augmentation = augmentation

    def with_batching(self, batching: str) -> AugmentedTrainer:
        """The same around the trainer batched so."""
        return AugmentedTrainer(self.trainer.with_batching(batching), self.augmentation)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients on distorted images; see `Trainer.fit`."""
        return self.trainer.fit(request, rule, [self._distorted(request, one) for one in work])

    def _distorted(self, order: Request, one: ClientWork) -> ClientWork:
        rng = generator(order.seed, Purpose.AUGMENT, round=round_of(order, one), client=one.client)
        return one._replace(examples=Examples(augment(one.examples.x, self.augmentation, rng), one.examples.y))


def augment(x_NHWC: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Images, each flipped, shifted and rotated about its centre; zero where nothing was. Bilinear between pixels.

    >>> augment(np.eye(3, dtype=np.float32)[None, :, :, None], Augmentation(flip=False, shift=0, rotation=0),
    ...     np.random.default_rng(1))[0, :, :, 0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    draws_N4 = rng.random((len(x_NHWC), 4))  # image n's depend on n alone, not on how many there are
    sign_N = np.where(augmentation.flip & (draws_N4[:, 0] < 0.5), -1.0, 1.0)
    shift_N2 = np.floor(draws_N4[:, 1:3] * (2 * augmentation.shift + 1)) - augmentation.shift
    angle_N = np.deg2rad(augmentation.rotation) * (2 * draws_N4[:, 3] - 1)
    out = np.empty_like(x_NHWC)
    for start in range(0, len(x_NHWC), CHUNK_SIZE):
        own = slice(start, start + CHUNK_SIZE)
        at_N2P = _sources(x_NHWC.shape[1:3], sign_N[own], shift_N2[own], angle_N[own])
        out[own] = _between_pixels(x_NHWC[own], at_N2P)
    return out


def _sources(size: tuple[int, ...], sign_N: np.ndarray, shift_N2: np.ndarray, angle_N: np.ndarray) -> np.ndarray:
    """Where each pixel of the new image lies in the old one, ``(N, 2, H x W)``, rows and columns."""
    centre_21 = (np.array(size)[:, None] - 1) / 2
    grid_2P = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).reshape(2, -1) - centre_21
    cos_N, sin_N = np.cos(angle_N), np.sin(angle_N)
    turn_N22 = np.array([[cos_N, -sin_N * sign_N], [sin_N, cos_N * sign_N]]).transpose(2, 0, 1)
    at_N2P: np.ndarray = turn_N22 @ (grid_2P - shift_N2[:, :, None]) + centre_21
    return at_N2P


def _between_pixels(x_NHWC: np.ndarray, at_N2P: np.ndarray) -> np.ndarray:
    """The images at points between pixels, from the four around each."""
    num_images, height, width, channels = x_NHWC.shape
    border = ((0, 0), (1, 2), (1, 2), (0, 0))
    flat = np.pad(x_NHWC, border).reshape(-1, channels)  # points outside fall on zeros
    row_NP = np.clip(at_N2P[:, 0] + 1, 0, height + 1)
    column_NP = np.clip(at_N2P[:, 1] + 1, 0, width + 1)
    top_NP, left_NP = row_NP.astype(np.int64), column_NP.astype(np.int64)
    down_NP1 = (row_NP - top_NP).astype(np.float32)[..., None]
    right_NP1 = (column_NP - left_NP).astype(np.float32)[..., None]
    first_NP = (np.arange(num_images)[:, None] * (height + 3) + top_NP) * (width + 3) + left_NP

    def row(first_NP: np.ndarray) -> np.ndarray:  # in place: what takes time here is memory
        left, right = flat.take(first_NP, axis=0), flat.take(first_NP + 1, axis=0)
        right -= left
        right *= right_NP1
        left += right
        return left

    upper, lower = row(first_NP), row(first_NP + width + 3)
    lower -= upper
    lower *= down_NP1
    upper += lower
    return upper.reshape(x_NHWC.shape)
