"""Augment training images: flip, shift and rotate them with new random numbers in every round.

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
from fedlearn.trainers.example_keys import example_keys, example_uniforms

CHUNK_SIZE = 256  # number of images that are transformed together; their pixels stay in the processor cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Set the augmentation of training images.

    Args:
        flip: mirror an image left to right with probability 1/2; default True.
        shift: maximum shift along each axis, in pixels, >= 0; default 4. Pixels from outside the image are 0.
        rotation: maximum rotation in either direction, in degrees, in [0, 180]; default 15.
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
    """Wrap a trainer and augment the images of each client, with new random numbers in each round.

    Args:
        trainer: trainer in any framework.
        augmentation: range of the random changes of an image.

    *Guarantees*:

    - The change of an image depends only on (seed, round, client, row). NumPy computes it before a framework reads
      the image. So torch and JAX, all engines and a resumed run train on the same pixels.
    - With DP-SGD, the change depends on the image and not on its row. At real clients it follows from a secret of the
      operating system. So one image more or less does not change the other images.
    - An image changes once per round, also if local training makes several passes.
    - Evaluation uses the original images.
    - One image gives one training example, so the guarantee of DP-SGD stays valid.
    """

    def __init__(self, trainer: Trainer, augmentation: Augmentation) -> None:
        super().__init__(trainer)
        self.augmentation = augmentation

    def with_batching(self, batching: str) -> AugmentedTrainer:
        """Return a wrapper of the trainer with another way to train a block."""
        return AugmentedTrainer(self.trainer.with_batching(batching), self.augmentation)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients on augmented images. See `Trainer.fit`."""
        return self.trainer.fit(request, rule, [self._augment(request, client_work) for client_work in work])

    def _augment(self, request: Request, work: ClientWork) -> ClientWork:
        if request.local.example_dp:
            draws_N4 = example_uniforms(example_keys(request, work, Purpose.AUGMENT), 4)
        else:
            rng = generator(request.seed, Purpose.AUGMENT, round=round_of(request, work), client=work.client)
            draws_N4 = rng.random((len(work.examples), 4))  # the numbers of image n depend on n, not on N
        return work._replace(examples=Examples(_change(work.examples.x, self.augmentation, draws_N4), work.examples.y))


def augment(x_NHWC: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Flip, shift and rotate each image about its centre, with bilinear interpolation.

    Args:
        x_NHWC: images ``(N, H, W, C)``.
        augmentation: range of the random changes.
        rng: source of the random numbers, four per image.

    Returns:
        Images ``(N, H, W, C)``. Pixels from outside the original image are 0.

    >>> augment(np.eye(3, dtype=np.float32)[None, :, :, None], Augmentation(flip=False, shift=0, rotation=0),
    ...     np.random.default_rng(1))[0, :, :, 0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return _change(x_NHWC, augmentation, rng.random((len(x_NHWC), 4)))


def _change(x_NHWC: np.ndarray, augmentation: Augmentation, draws_N4: np.ndarray) -> np.ndarray:
    """Flip, shift and rotate each image by four uniform numbers per image."""
    sign_N = np.where(augmentation.flip & (draws_N4[:, 0] < 0.5), -1.0, 1.0)
    shift_N2 = np.floor(draws_N4[:, 1:3] * (2 * augmentation.shift + 1)) - augmentation.shift
    angle_N = np.deg2rad(augmentation.rotation) * (2 * draws_N4[:, 3] - 1)
    out = np.empty_like(x_NHWC)
    for start in range(0, len(x_NHWC), CHUNK_SIZE):
        chunk = slice(start, start + CHUNK_SIZE)
        at_N2P = _source_points(x_NHWC.shape[1:3], sign_N[chunk], shift_N2[chunk], angle_N[chunk])
        out[chunk] = _interpolate(x_NHWC[chunk], at_N2P)
    return out


def _source_points(size: tuple[int, ...], sign_N: np.ndarray, shift_N2: np.ndarray, angle_N: np.ndarray) -> np.ndarray:
    """Return the position in the original image of each pixel, ``(N, 2, H x W)``: rows and columns."""
    centre_21 = (np.array(size)[:, None] - 1) / 2
    grid_2P = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).reshape(2, -1) - centre_21
    cos_N, sin_N = np.cos(angle_N), np.sin(angle_N)
    turn_N22 = np.array([[cos_N, -sin_N * sign_N], [sin_N, cos_N * sign_N]]).transpose(2, 0, 1)
    at_N2P: np.ndarray = turn_N22 @ (grid_2P - shift_N2[:, :, None]) + centre_21
    return at_N2P


def _interpolate(x_NHWC: np.ndarray, at_N2P: np.ndarray) -> np.ndarray:
    """Return the images at these points, by bilinear interpolation between four pixels."""
    num_images, height, width, channels = x_NHWC.shape
    border = ((0, 0), (1, 2), (1, 2), (0, 0))
    flat = np.pad(x_NHWC, border).reshape(-1, channels)  # points outside the image read zeros
    row_NP = np.clip(at_N2P[:, 0] + 1, 0, height + 1)
    column_NP = np.clip(at_N2P[:, 1] + 1, 0, width + 1)
    top_NP, left_NP = row_NP.astype(np.int64), column_NP.astype(np.int64)
    down_NP1 = (row_NP - top_NP).astype(np.float32)[..., None]
    right_NP1 = (column_NP - left_NP).astype(np.float32)[..., None]
    first_NP = (np.arange(num_images)[:, None] * (height + 3) + top_NP) * (width + 3) + left_NP

    def row(first_NP: np.ndarray) -> np.ndarray:  # in place, because memory traffic takes most of the time
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
