"""Choose the normalization of images from the depth of their pixels or from a window.

Shapes: N images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedlearn.data.images import Depth
from fedlearn.data.inputs import ImageInputs
from fedlearn.errors import SettingError, is_number, require

LOW_RANGE = 0.25  # share of the range of 16 bits below which the header suggests a window


def fit_images(images: np.ndarray, window: Sequence[float] | None) -> tuple[ImageInputs, str]:
    """Return the inputs for images, and their description for the header.

    The range of unsigned integers of 8 or 16 bits becomes -1 to 1. Other values need a window, unless they are floats
    from 0 to 1.

    Args:
        images: pixels ``(N, height, width, channels)``.
        window: centre and width, in pixel values; the window becomes -1 to 1, and values outside are clipped.

    Raises:
        SettingError: the window is not valid, or is missing for values of any range.
    """
    height, width, channels = images.shape[1:]
    depth: Depth = {"uint8": 8, "uint16": 16}.get(images.dtype.name, 0)  # type: ignore[assignment]
    shown = f"{width} x {height} {'grey' if channels == 1 else 'RGB'}"
    if window is not None:
        _check_window(window)
        centre, spread = map(float, window)
        offset, scale, line = centre, spread / 2, f"window {centre:g} ± {spread / 2:g}, scaled to -1..1"
    elif depth:
        offset = scale = (2**depth - 1) / 2
        line = f"{depth} bits, scaled to -1..1{_low_range_hint(images, 2 * scale)}"
    else:
        low, high = float(images.min()), float(images.max())
        expected = "[centre,width], because the images have signed integers or floats, whose range is not known"
        fits = low >= 0 and high <= 1
        require(fits, "window", window, expected, f"'window={_window_of(low, high)}', the range of these images")
        offset, scale, line = 0.5, 0.5, "floats from 0 to 1, scaled to -1..1"
    inputs = ImageInputs(
        height=height,
        width=width,
        channels=channels,
        offset=offset,
        scale=scale,
        depth=depth,
        clip=window is not None,
    )
    return inputs, f"{shown}, {line}"


def _check_window(window: Sequence[float]) -> None:
    is_pair = isinstance(window, Sequence) and not isinstance(window, str) and len(window) == 2
    are_numbers = is_pair and all(is_number(value) and math.isfinite(value) for value in window)
    if not are_numbers or window[1] <= 0:
        expected = "[centre,width] in pixel values, width > 0"
        raise SettingError("window", window, expected, "'window=[40,400]', for soft tissue in CT")


def _low_range_hint(images: np.ndarray, scale: float) -> str:
    """Return a hint for images of, e.g., 12 bits in files of 16 bits."""
    high = float(images.max(initial=0))
    if scale < 2**16 - 1 or high > LOW_RANGE * scale or not high:
        return ""
    return f" (largest value {high:g}: scenario.window={_window_of(0, 2 ** math.ceil(math.log2(high + 1)))} fits)"


def _window_of(low: float, high: float) -> str:
    """Return a window from low to high, e.g. ``[50,100]``.

    >>> _window_of(-1000, 3000)
    '[1000,4000]'
    """
    return f"[{(low + high) / 2:.6g},{(high - low) or 1:.6g}]"
