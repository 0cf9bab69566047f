"""Turn raw examples into model inputs: rows of a table, images, texts or arrays.

One object of this module transforms the examples of training, of predictions and of exports. It holds constants only,
so its result does not depend on any other example.

Shapes: N examples, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, ClassVar, get_args

import numpy as np

from fedlearn.data.column_types import Column
from fedlearn.data.images import Depth
from fedlearn.data.prompt_inputs import PromptInputs
from fedlearn.data.subword_tokenizer import SubwordTokenizer
from fedlearn.data.tables import Table, missing_column
from fedlearn.data.text_tokenizers import CharacterEncoding, HashingTokenizer
from fedlearn.data.token_inputs import SubwordTokenInputs, TokenInputs
from fedlearn.errors import DataError, is_count, is_number

MAX_AXIS = 2**24  # largest size of an axis of an input
UNKNOWN_FIX = "correcting the cell, or --allow-unknown, which counts such a cell as missing"


@dataclass(frozen=True, kw_only=True)
class TableInputs:
    """Turn rows of a table into features, with the columns in this order.

    Args:
        columns: kinds and constants of the columns; a column may occur several times.
        shape: shape of one example; None is ``(F,)``.

    >>> from fedlearn.data.column_types import Category, Number
    >>> columns = (Number(name="age", centre=50.0, spread=10.0), Category(name="sex", levels=("f",)))
    >>> inputs = TableInputs(columns=columns)
    >>> table = Table({"sex": np.array(["f"], object), "age": np.array([60.0])}, (("a.csv", 2, 1),))
    >>> inputs.transform(table).tolist()
    [[1.0, 1.0]]
    """

    columns: tuple[Column, ...]
    shape: tuple[int, ...] | None = None
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        if not self.columns or not all(isinstance(column, Column) for column in self.columns):
            raise ValueError("a table without columns, or with a wrong column")
        if self.shape is not None and prod(_axes(self.shape)) != self.num_features:
            raise ValueError("a shape that differs from the number of features")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, each once."""
        return tuple(dict.fromkeys(column.name for column in self.columns))

    @property
    def num_features(self) -> int:
        """Number of features of one example, F."""
        return sum(column.num_features for column in self.columns)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.num_features,) if self.shape is None else self.shape

    def transform(
        self, table: Table, *, allow_unknown: bool = False, allow_missing: bool = False, unknown_fix: str = UNKNOWN_FIX
    ) -> np.ndarray:
        """Return the model inputs ``(N, ...)`` float32. Other columns of the table have no effect.

        Args:
            table: rows, with the columns in any order.
            allow_unknown: whether an unknown category counts as missing. If not, it is an error.
            allow_missing: whether an absent column counts as missing in all rows. If not, it is an error.
            unknown_fix: thing to try after the error for an unknown category.

        Raises:
            DataError: a column is absent, or a cell is not valid for its column; the message names row and column.
        """
        table = self._with_missing_columns(table, allow_missing)
        parts = []
        for column in self.columns:
            part = column.features(table, allow_unknown=allow_unknown, unknown_fix=unknown_fix)
            with np.errstate(over="ignore"):
                parts.append(part.astype(np.float32))
            infinite_N = np.asarray(~np.isfinite(parts[-1]).all(axis=1))
            table.refuse(infinite_N, column.name, "too large for a model of 32-bit numbers", "correcting the cell")
        return np.concatenate(parts, axis=1).reshape(len(table), *self.input_shape)

    def _with_missing_columns(self, table: Table, allow_missing: bool) -> Table:
        columns = dict(table.columns)
        for column in self.columns:
            if column.name in table.columns:
                continue
            if not allow_missing or not column.accepts_missing:
                raise missing_column(table, column.name, self.names, can_be_missing=column.accepts_missing)
            columns[column.name] = np.full(len(table), None, object)
        return Table(columns, table.origins)


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Normalize images of one size: ``(pixel - offset) / scale`` in 32-bit arithmetic.

    Args:
        height: height in pixels.
        width: width in pixels.
        channels: 1 for grey, 3 for colour.
        offset: pixel value that becomes 0.
        scale: difference of pixel values that becomes 1, > 0.
        depth: bits of the pixel values that ``offset`` and ``scale`` refer to: 8, 16, or 0 for values of any range.
        clip: whether results below -1 become -1, and results above 1 become 1, as in a window of a CT image.

    >>> window = ImageInputs(height=1, width=3, channels=1, offset=40.0, scale=200.0, depth=0, clip=True)
    >>> window.normalize(np.array([[[-1000.0, 40.0, 140.0]]])).ravel().tolist()
    [-1.0, 0.0, 0.5]
    """

    height: int
    width: int
    channels: int
    offset: float = 0.0
    scale: float = 255.0
    depth: Depth = 8
    clip: bool = False
    kind: ClassVar[str] = "images"

    def __post_init__(self) -> None:
        _axes(self.input_shape)
        is_scale = is_number(self.offset) and is_number(self.scale, at_least=0) and 0 < self.scale < math.inf
        is_depth = self.depth in get_args(Depth) and isinstance(self.clip, bool)
        if self.channels not in (1, 3) or not is_scale or not math.isfinite(self.offset) or not is_depth:
            raise ValueError("a wrong normalization of images")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.height, self.width, self.channels)

    def transform(self, images: np.ndarray) -> np.ndarray:
        """Return the model inputs ``(N, height, width, channels)`` float32.

        Args:
            images: integers ``(N, height, width)`` or ``(N, height, width, channels)``, which are normalized, or
                floats, which are normalized already.

        Raises:
            DataError: the images have another size.
        """
        if images.dtype.kind in "iu":
            return self.normalize(images)
        self._check_shape(images)
        return images.astype(np.float32).reshape(len(images), *self.input_shape)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Return the model inputs of pixels as files have them, also of floats.

        Raises:
            DataError: the images have another size.
        """
        self._check_shape(pixels)
        x = pixels.astype(np.float32)
        if self.depth and pixels.dtype in (np.uint8, np.uint16) and pixels.dtype.itemsize * 8 != self.depth:
            x *= np.float32(257 if self.depth == 16 else 1 / 257)
        x -= np.float32(self.offset)
        x /= np.float32(self.scale)
        if self.clip:
            np.clip(x, -1, 1, out=x)
        return x.reshape(len(x), *self.input_shape)

    def _check_shape(self, images: np.ndarray) -> None:
        if images.shape[1:] not in (self.input_shape, self.input_shape[:2] if self.channels == 1 else None):
            expected = " x ".join(map(str, self.input_shape))
            shape = " x ".join(map(str, images.shape[1:]))
            raise DataError(f"an image has {shape} pixels\n  expected  {expected}\n  advice    images of this size")


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    """Turn texts into token numbers.

    Args:
        tokenizer: tokenizer with its vocabulary or its hash.
    """

    tokenizer: HashingTokenizer | SubwordTokenizer
    kind: ClassVar[str] = "texts"

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, HashingTokenizer | SubwordTokenizer):
            raise ValueError("a wrong tokenizer")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.tokenizer.length,)

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """Return the model inputs: ``(N, T)`` int32, or ``(N,)`` with the fields of a pretrained model.

        Raises:
            MissingExtra: the library tokenizers is not installed.
        """
        return self.tokenizer.encode(texts)


@dataclass(frozen=True, kw_only=True)
class TextColumnInputs:
    """Turn the texts in columns of a table into token numbers. The texts of several columns are joined by a line break.

    Args:
        columns: names of the columns, in this order.
        tokenizer: tokenizer with its hash, or the tokenizer of a pretrained model.
    """

    columns: tuple[str, ...]
    tokenizer: HashingTokenizer | SubwordTokenizer
    kind: ClassVar[str] = "text columns"

    def __post_init__(self) -> None:
        are_names = isinstance(self.columns, tuple) and all(isinstance(name, str) and name for name in self.columns)
        is_tokenizer = isinstance(self.tokenizer, HashingTokenizer | SubwordTokenizer)
        if not self.columns or not are_names or not is_tokenizer:
            raise ValueError("wrong columns or a wrong tokenizer")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.tokenizer.length,)

    def transform(
        self, table: Table, *, allow_unknown: bool = False, allow_missing: bool = False, unknown_fix: str = ""
    ) -> np.ndarray:
        """Return the model inputs: ``(N, T)`` int32, or the fields of a pretrained model. A missing text is empty.

        Args:
            table: rows, with the columns in any order.
            allow_unknown: without effect, because all words have a number.
            allow_missing: whether an absent column counts as missing in all rows. If not, it is an error.
            unknown_fix: without effect.

        Raises:
            DataError: a column is absent.
            MissingExtra: the library tokenizers is not installed.
        """
        return self.tokenizer.encode(self.texts(table, allow_missing=allow_missing))

    def texts(self, table: Table, *, allow_missing: bool = False) -> list[str]:
        """Return the text of each row; see `transform`."""
        for name in self.columns:
            if name not in table.columns and not allow_missing:
                raise missing_column(table, name, self.columns, can_be_missing=True)
        cells = [table.columns.get(name, np.full(len(table), None, object)) for name in self.columns]
        present = [[str(cell) for cell in row if cell is not None] for row in zip(*cells, strict=True)]
        return ["\n".join(texts) for texts in present]


@dataclass(frozen=True, kw_only=True)
class CharacterInputs:
    """Turn text into character numbers, for a language model.

    Args:
        encoding: alphabet, and number of characters of an input.
    """

    encoding: CharacterEncoding
    kind: ClassVar[str] = "characters"

    def __post_init__(self) -> None:
        if not isinstance(self.encoding, CharacterEncoding):
            raise ValueError("a wrong encoding of characters")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.encoding.length,)

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """Return the model inputs ``(N, T)`` int32: the last T characters of each text, padded with 0 at the end."""
        x = np.zeros((len(texts), self.encoding.length), np.int32)
        for row_T, text in zip(x, texts, strict=True):
            tokens_T = self.encoding.encode(text[-self.encoding.length :])
            row_T[: len(tokens_T)] = tokens_T
        return x


@dataclass(frozen=True, kw_only=True)
class ArrayInputs:
    """Accept model inputs as they are. The data of a user's own scenario have no other description.

    Args:
        shape: shape of one model input.
    """

    shape: tuple[int, ...]
    kind: ClassVar[str] = "arrays"

    def __post_init__(self) -> None:
        _axes(self.shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return self.shape

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Return the model inputs ``(N, ...)`` float32."""
        return model_inputs(x, self.shape)


Inputs = (
    TableInputs
    | ImageInputs
    | TextInputs
    | TextColumnInputs
    | TokenInputs
    | SubwordTokenInputs
    | CharacterInputs
    | ArrayInputs
    | PromptInputs
)


def model_inputs(x: np.ndarray, shape: tuple[int, ...], *, source: str = "the array") -> np.ndarray:
    """Return an array of model inputs as ``(N, *shape)``, after a check of its shape and its numbers.

    Raises:
        DataError: the shape differs, or a number is missing or not finite; the message names the row.
    """
    x = np.asarray(x)
    if not len(x) or (x.shape[1:] != shape and prod(x.shape[1:]) != prod(shape)):
        expected = " x ".join(map(str, shape)) or "one number"
        raise DataError(
            f"{source} has examples of shape {x.shape[1:]}\n  expected  {expected}, the input shape of the model\n"
            "  advice    a file with examples of this shape"
        )
    if x.dtype.kind not in "iufb":
        raise DataError(f"{source} holds {x.dtype}\n  expected  numbers\n  advice    an array of floats")
    bad_N = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad_N.any():
        row = int(bad_N.argmax()) + 1
        raise DataError(
            f"{source} has a value that is missing or not finite in row {row}\n  expected  finite numbers\n"
            f"  advice    correct row {row}"
        )
    return x.reshape(len(x), *shape).astype(np.float32)


def _axes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(is_count(size) and size <= MAX_AXIS for size in chain(shape, [1])):
        raise ValueError("a wrong shape")
    return shape
