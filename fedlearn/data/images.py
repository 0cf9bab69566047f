"""Read image files to arrays of one size, one kind of pixels, and one number of channels.

Conversions: the orientation in EXIF is applied. Palettes, CMYK and other colour spaces become RGB. Black and white
becomes grey. Transparent pixels become white. All images are grey, or all are in colour. Values keep their depth:
8 bits, 16 bits, or values of any range (signed integers and floats).

Shapes: N images.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from fedlearn.errors import DataError, MissingExtra

ImageFile = Path | BinaryIO
Depth = Literal[8, 16, 0]  # bits of unsigned integers; 0 for values of any range
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".dib", ".gif"),
    *(".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
DICOM_SUFFIXES = (".dcm", ".dicom")
UNREADABLE_SUFFIXES = {  # ending -> thing to try
    ".nii": "one PNG, TIFF or DICOM file for each slice",
    ".nii.gz": "one PNG, TIFF or DICOM file for each slice",
    ".mha": "one PNG, TIFF or DICOM file for each slice",
    ".mhd": "one PNG, TIFF or DICOM file for each slice",
    ".nrrd": "one PNG, TIFF or DICOM file for each slice",
    ".svs": "tiles of the slide as PNG files",
    ".heic": "the images as JPEG or PNG",
    ".heif": "the images as JPEG or PNG",
    ".svg": "the images as PNG",
    ".psd": "the images as PNG",
    ".npy": "the images as PNG or TIFF, or fedlearn.from_arrays",
}
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of Pillow
MAX_PIXELS = 89_478_485  # pixels of one image; the limit of Pillow
MAX_NAMED = 10  # files that a message names
ORIENTATION = 0x0112  # tag of EXIF
NUM_SIDEWAYS = 5  # orientations from this number exchange width and height


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """Hold the properties of an image file that are known before its pixels are read.

    Args:
        width: width in pixels, after the orientation is applied.
        height: height in pixels, after the orientation is applied.
        is_grey: whether the image has no colours.
        depth: bits of a value, or 0 for values of any range.
        conversion: conversion that the image needs, e.g. ``palette to RGB``; may be empty.
    """

    width: int
    height: int
    is_grey: bool
    depth: Depth
    conversion: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageArrays:
    """Hold images.

    Args:
        pixels: ``(N, height, width, channels)``: uint8, uint16, or float32 for values of any range.
        names: names of the files, without left out files.
        kept: position of each image among all files.
        notes: conversions and left out files, for the header of a run.
    """

    pixels: np.ndarray
    names: tuple[str, ...] = ()
    kept: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())


def is_image(file: Path) -> bool:
    """Return whether `read_images` reads files of this name."""
    return file.suffix.lower() in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES)


def unreadable_kind(file: Path) -> str | None:
    """Return the ending of an image file in a format that fedlearn does not read; None for all other files."""
    return next((ending for ending in sorted(UNREADABLE_SUFFIXES, key=len)[::-1] if _ends(file, ending)), None)


def _ends(file: Path, ending: str) -> bool:
    return file.name.lower().endswith(ending)


def read_images(
    files: Sequence[ImageFile],
    names: Sequence[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    depth: Depth | None = None,
    skip_damaged: bool = False,
) -> ImageArrays:
    """Read images as one array. The message of an error has all files that cannot be used.

    Args:
        files: images in any format of Pillow, or DICOM.
        names: names of these files, for messages.
        size: height and width to which images are scaled, in pixels; None keeps their size.
        channels: 1 for grey, 3 for colour; None is colour if an image is in colour.
        depth: depth of the pixels; None is the largest depth of these images.
        skip_damaged: whether files that cannot be read are left out. If not, they are an error.

    Raises:
        DataError: files are no images, or differ in size; the message names them.
        MissingExtra: Pillow or pydicom is not installed.
    """
    headers, problems = read_headers(files)
    if not headers:
        _refuse_damaged(problems, names, [])
    pixel_depth = _common_depth(list(headers.values())) if depth is None else depth
    num_channels = channels or (1 if all(header.is_grey for header in headers.values()) else 3)
    shape = (size, size) if isinstance(size, int) else size
    if shape is None:
        shape = _common_size(files, headers, names, problems)
    pixels = np.empty((len(headers), *shape, num_channels), _DTYPES[pixel_depth])
    kept: list[int] = []
    for place in headers:
        array = _try(_Decoder(shape, num_channels, pixel_depth), files[place], place, problems)
        if array is not None:
            pixels[len(kept)] = array
            kept.append(place)
    if problems and not (skip_damaged and kept):
        _refuse_damaged(problems, names, kept)
    notes = _notes(list(headers.values()), num_channels, len(files), problems)
    return ImageArrays(
        pixels=pixels[: len(kept)], names=tuple(names[place] for place in kept), kept=tuple(kept), notes=notes
    )


def read_headers(files: Sequence[ImageFile]) -> tuple[dict[int, ImageHeader], dict[int, str]]:
    """Return the header of each image by its position, and the reason for each file without a header.

    Raises:
        MissingExtra: Pillow or pydicom is not installed.
    """
    problems: dict[int, str] = {}
    headers = {place: header for place, file in enumerate(files) if (header := _try(_header, file, place, problems))}
    return headers, problems


_DTYPES = {8: np.uint8, 16: np.uint16, 0: np.float32}


class ImageProblem(ValueError):
    """Report a file that cannot be used, with the reason."""


def _try(read: Any, file: ImageFile, place: int, problems: dict[int, str]) -> Any:
    """Return the result of ``read(file)``, or None after a problem, which is recorded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata and of large images
            return read(file)
    except (MissingExtra, KeyboardInterrupt):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files, such as SyntaxError and struct.error
        problems[place] = str(error) if isinstance(error, ImageProblem) else _reason(file, error)
        return None


def _reason(file: ImageFile, error: Exception) -> str:
    if isinstance(file, Path) and not file.exists():
        return "a link to a file that does not exist" if file.is_symlink() else "no such file"
    if isinstance(file, Path) and file.stat().st_size == 0:
        return "an empty file"
    if type(error).__name__ == "DecompressionBombError":
        return f"more than {MAX_PIXELS:,} pixels"
    is_foreign = type(error).__name__ == "UnidentifiedImageError"
    return "not an image, or damaged" if is_foreign else "damaged or cut short"


@contextmanager
def _open(file: ImageFile) -> Iterator[Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("reading images", "data") from error
    if isinstance(file, io.IOBase):
        file.seek(0)
    if isinstance(file, Path) and file.suffix.lower() in DICOM_SUFFIXES:
        from fedlearn.data.dicom import open_dicom

        yield open_dicom(file)
        return
    with Image.open(file) as opened:
        yield opened


def _header(file: ImageFile) -> ImageHeader:
    with _open(file) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageProblem(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # cameras add a preview as second picture of a JPEG
            raise ImageProblem(f"{frames} frames or pages in one file")
        if image.getexif().get(ORIENTATION, 1) >= NUM_SIDEWAYS:
            width, height = height, width
        is_grey = _is_grey(image)
        return ImageHeader(
            width=width, height=height, is_grey=is_grey, depth=_depth(image), conversion=_conversion(image, is_grey)
        )


def _load(file: ImageFile) -> None:
    with _open(file) as image:
        image.load()


def _depth(image: Any) -> Depth:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 16
    return 0 if image.mode in ("I", "F") else 8


def _is_grey(image: Any) -> bool:
    if image.mode in GREY_MODES:
        return True
    if image.mode not in ("P", "PA") and image.format != "WEBP":  # WebP has no grey images
        return False
    rgb = np.asarray(image.convert("RGB"))
    return bool((rgb[..., :1] == rgb[..., 1:]).all())


def _conversion(image: Any, is_grey: bool) -> str:
    if _has_transparency(image):
        return "transparent pixels to white"
    if image.mode in ("RGB", "L", "I", "F") or image.mode.startswith("I;16"):
        return ""
    names = {"1": "black and white", "P": "palette"}
    return f"{names.get(image.mode, image.mode)} to {'grey' if is_grey else 'RGB'}"


def _has_transparency(image: Any) -> bool:
    return "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True)
class _Decoder:
    """Read the pixels of a file.

    Args:
        shape: height and width.
        channels: 1 or 3.
        depth: depth of the pixels.
    """

    shape: tuple[int, int]
    channels: int
    depth: Depth

    def __call__(self, file: ImageFile) -> np.ndarray:
        """Return the pixels ``(height, width, channels)``."""
        from PIL import Image, ImageOps

        with _open(file) as opened:
            own_depth = _depth(opened)
            image = ImageOps.exif_transpose(opened)
            image = _without_transparency(image) if _has_transparency(image) else image
            if own_depth == 8:
                image = image.convert("L" if self.channels == 1 else "RGB")
            else:
                image = Image.fromarray(np.asarray(image).astype(np.float32))
            if image.size != self.shape[::-1]:
                image = image.resize(self.shape[::-1], Image.Resampling.BILINEAR)
            array = _in_depth(np.asarray(image), own_depth, self.depth).reshape(*self.shape, -1)
            return np.broadcast_to(array, (*self.shape, self.channels))


def _without_transparency(image: Any) -> Any:
    """Return an image on a white background."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # one transparent value, of which Pillow has no mask
        return image
    is_grey = image.mode in GREY_MODES
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, with_alpha).convert("L" if is_grey else "RGB")


def _in_depth(array: np.ndarray, depth: Depth, target: Depth) -> np.ndarray:
    """Return pixels in another depth: 16 bits are 257 times 8 bits."""
    if depth == target:
        return np.asarray(np.rint(array) if target == 16 else array).astype(_DTYPES[target])
    if target == 0:
        return array.astype(np.float32)
    if depth == 0:
        raise ImageProblem("signed integers or floats, but the model has images of unsigned integers")
    scaled = array.astype(np.float64) * (257 if target == 16 else 1 / 257)
    return np.rint(scaled).astype(_DTYPES[target])


def _common_depth(headers: Sequence[ImageHeader]) -> Depth:
    depths = {header.depth for header in headers}
    return 0 if 0 in depths else 16 if 16 in depths else 8


def _common_size(
    files: Sequence[ImageFile], headers: dict[int, ImageHeader], names: Sequence[str], problems: dict[int, str]
) -> tuple[int, int]:
    """Return height and width of all images.

    Raises:
        DataError: the images differ in size.
    """
    sizes = Counter((header.height, header.width) for header in headers.values())
    if len(sizes) == 1:
        return next(iter(sizes))
    for place in headers:
        _try(_load, files[place], place, problems)  # the message has all problems
    examples = {(header.height, header.width): names[place] for place, header in reversed(headers.items())}
    shown = ", ".join(
        f"{width} x {height} ({count}, e.g. {examples[height, width]})"
        for (height, width), count in sizes.most_common(5)
    )
    damaged = f"\n  also      {_listed(problems, names)}" if problems else ""
    smallest = min(min(size) for size in sizes)
    raise DataError(
        f"the images have {len(sizes)} sizes: {shown}{damaged}\n  expected  images of one size, or a common size\n"
        f"  try       scenario.image_size={smallest}"
    )


def _refuse_damaged(problems: dict[int, str], names: Sequence[str], kept: Sequence[int]) -> None:
    count = f"{len(problems)} of {len(names)} images" if len(names) > 1 else names[0]
    fix = "scenario.skip_damaged=true" if kept else "images in a format such as PNG, JPEG or TIFF"
    reason = _listed(problems, names) if len(names) > 1 else next(iter(problems.values()))
    expected = "images of one frame that can be read"
    raise DataError(f"{count} cannot be read as an image: {reason}\n  expected  {expected}\n  try       {fix}")


def _listed(problems: dict[int, str], names: Sequence[str]) -> str:
    """Return the first files by reason, and the number of other files."""
    shown = [f"{names[place]} ({problems[place]})" for place in sorted(problems)[:MAX_NAMED]]
    rest = len(problems) - len(shown)
    return ", ".join([*shown, *([f"and {rest} more"] if rest else [])])


def _notes(headers: Sequence[ImageHeader], channels: int, num_files: int, problems: dict[int, str]) -> tuple[str, ...]:
    notes = [f"{len(problems)} of {num_files} images cannot be read and are left out"] if problems else []
    num_grey = sum(header.is_grey for header in headers)
    if 0 < num_grey < len(headers):
        notes.append(f"{num_grey} grey and {len(headers) - num_grey} colour images, all to {_channels(channels)}")
    elif num_grey != len(headers) * (channels == 1):
        notes.append(f"all images to {_channels(channels)}")
    depths = Counter(header.depth for header in headers)
    if len(depths) > 1:
        notes.append(", ".join(f"{count} images of {_depth_name(depth)}" for depth, count in depths.most_common()))
    conversions = Counter(header.conversion for header in headers if header.conversion)
    notes += [f"{conversion} ({count})" for conversion, count in conversions.most_common()]
    return tuple(notes)


def _channels(channels: int) -> str:
    return "grey" if channels == 1 else "RGB"


def _depth_name(depth: Depth) -> str:
    return f"{depth} bits" if depth else "values of any range"
