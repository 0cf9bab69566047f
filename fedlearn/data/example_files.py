"""Read new examples from files in batches, so that memory does not grow with the number of examples.

Shapes: N examples.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedlearn.data.arrow_tables import from_arrow, open_parquet
from fedlearn.data.download.decompress import open_decompressed
from fedlearn.data.folder_layout import is_system_file
from fedlearn.data.images import is_image, read_images
from fedlearn.data.inputs import (
    CharacterInputs,
    ImageInputs,
    Inputs,
    TableInputs,
    TextColumnInputs,
    TextInputs,
    model_inputs,
)
from fedlearn.data.json_lines import is_json_lines, read_json_batches
from fedlearn.data.levels import to_category
from fedlearn.data.prompt_inputs import PromptInputs
from fedlearn.data.tables import Table, check_header, is_table, read_table
from fedlearn.data.text_files import read_text_batches
from fedlearn.data.token_files import Sentence, read_sentences
from fedlearn.data.token_inputs import SubwordTokenInputs, TokenInputs
from fedlearn.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class InputBatch:
    """Hold some examples as model inputs.

    Args:
        x: model inputs, ``(N, ...)``.
        table: the rows of the examples; None if they come from no table.
        files: names of the image files; empty if the examples are no images.
        sentences: tokens of the sentences; empty for other examples.
    """

    x: np.ndarray
    table: Table | None = None
    files: tuple[str, ...] = ()
    sentences: tuple[Sentence, ...] = ()


def read_batches(
    path: Path, inputs: Inputs, batch_size: int, *, allow_unknown: bool = False, allow_missing: bool = False
) -> Iterator[InputBatch]:
    """Yield the examples of a file or of a folder of images, ``batch_size`` at a time.

    ``.npy`` files, and ``.npz`` files with an array ``x``, hold model inputs. All other files hold raw examples.

    Args:
        path: table, text with one example per line, CoNLL file, image, folder of images, or arrays.
        inputs: inputs of the model.
        batch_size: largest number of examples in memory, >= 1.
        allow_unknown: see `fedlearn.data.inputs.TableInputs.transform`.
        allow_missing: see `fedlearn.data.inputs.TableInputs.transform`.

    Raises:
        DataError: the path cannot be read, or an example is not valid; the message names file, row and column.
    """
    if not path.is_file() and not list_images(path):
        raise DataError(
            f"--data={path} is not a file\n  expected  a file of examples, or a folder of images\n"
            "  try       --data examples.npy"
        )
    if path.suffix in (".npy", ".npz"):
        yield from _array_batches(path, inputs.input_shape, batch_size)
    elif isinstance(inputs, TableInputs | TextColumnInputs | PromptInputs):
        for table in read_table_batches(path, batch_size):
            x = inputs.transform(table, allow_unknown=allow_unknown, allow_missing=allow_missing)
            yield InputBatch(x=x, table=table)
    elif isinstance(inputs, ImageInputs):
        for files in batched(_images(path), batch_size):
            pixels = read_image_files(files, inputs)
            yield InputBatch(x=inputs.normalize(pixels), files=tuple(file.name for file in files))
    elif isinstance(inputs, TokenInputs | SubwordTokenInputs):
        for sentences in batched(read_sentences(path, has_tags=False), batch_size):
            x = inputs.transform([sentence.tokens for sentence in sentences])
            yield InputBatch(x=x, sentences=tuple(sentences))
    elif isinstance(inputs, TextInputs | CharacterInputs):
        for lines in batched(_lines(path), batch_size):
            yield InputBatch(x=inputs.transform(lines))
    else:
        yield from _array_batches(path, inputs.input_shape, batch_size)


def read_table_batches(file: Path, batch_size: int) -> Iterator[Table]:
    """Yield a table in parts of ``batch_size`` rows; see `fedlearn.data.tables.read_table` for the formats.

    Raises:
        DataError: the file is no table, or a row cannot be read.
        MissingExtra: pyarrow is needed and not installed.
    """
    if not is_table(file):
        read_table(file)  # raises the error for a file that is no table
    if is_json_lines(file):
        parts = read_json_batches(file, batch_size)
    elif file.suffix.lower() == ".parquet":
        parts = _parquet_batches(file, batch_size)
    else:
        parts = read_text_batches(file, batch_size)
    first = next(parts, None)
    if first is None:
        raise DataError(f"{file.name} has no rows\n  advice    a file with one row per example")
    yield from chain([first], parts)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``; the last list can be shorter.

    >>> list(batched("abc", 2))
    [['a', 'b'], ['c']]
    """
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _parquet_batches(file: Path, batch_size: int) -> Iterator[Table]:
    with open_parquet(file) as parquet:
        check_header(file, parquet.schema_arrow.names)
        first_row = 1
        for batch in parquet.iter_batches(batch_size=batch_size):
            yield from_arrow(_as_table(batch), file.name, first_row=first_row)
            first_row += batch.num_rows


def _as_table(batch: Any) -> Any:
    import pyarrow

    return pyarrow.Table.from_batches([batch])


def list_images(path: Path) -> list[Path]:
    """Return the image at a path, or the images of a folder in order of their names."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if is_image(file) and file.is_file() and not is_system_file(file.name)]


def read_image_files(files: Sequence[Path], inputs: ImageInputs) -> np.ndarray:
    """Read images for a model, as pixels ``(N, height, width, channels)`` of its depth, scaled to its size.

    Raises:
        DataError: files cannot be read as images; the message names them.
        MissingExtra: Pillow or pydicom is not installed.
    """
    names, size = [file.name for file in files], (inputs.height, inputs.width)
    return read_images(files, names, size=size, channels=inputs.channels, depth=inputs.depth).pixels


def _images(path: Path) -> Sequence[Path]:
    files = list_images(path)
    if not files:
        raise DataError(
            f"{path} is neither an image nor a folder of images\n  advice    a .png or .jpg file, or a folder of them"
        )
    return files


def _lines(file: Path) -> Iterator[str]:
    is_empty = True
    with open_decompressed(file) as raw:
        try:
            for line in io.TextIOWrapper(raw, encoding="utf-8", newline="\n"):
                if line.strip():
                    is_empty = False
                    yield line.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: {error}\n  advice    a UTF-8 file with one text per line") from error
    if is_empty:
        raise DataError(f"{file} contains no text\n  advice    a UTF-8 file with one text per line")


def _array_batches(path: Path, shape: tuple[int, ...], batch_size: int) -> Iterator[InputBatch]:
    array = _read_array(path)
    for start in range(0, len(array), batch_size):
        part = np.asarray(array[start : start + batch_size])
        source = str(path) if start == 0 else f"{path}, examples from {start + 1},"
        yield InputBatch(x=model_inputs(part, shape, source=source))


def _read_array(path: Path) -> np.ndarray:
    """Return model inputs; a ``.npy`` file stays on disk."""
    try:
        if path.suffix == ".npy":
            array: Any = np.load(path, allow_pickle=False, mmap_mode="r")
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                array = arrays["x"]
        else:
            array = _read_numbers(path)
    except (OSError, KeyError, ValueError) as error:
        expected = "a .npy file, a .npz file with an array x, or a .csv file of numbers"
        problem = f"{path} cannot be read: {error}"
        raise DataError(f"{problem}\n  expected  {expected}\n  try       --data examples.npy") from error
    if array.ndim < 1 or not len(array):
        raise DataError(
            f"{path} has shape {array.shape}\n  expected  a row for each example, and at least one row\n"
            "  advice    an array of shape (examples, features)"
        )
    return np.asanyarray(array)


def _read_numbers(data: Path) -> np.ndarray:
    with data.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and not all(_is_number(cell) for cell in rows[0]):
        del rows[0]  # column names
    return np.array([[float(cell) for cell in row] for row in rows])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def id_columns(table: Table, names: Sequence[str]) -> Mapping[str, list[str]]:
    """Return columns of a table as text, with each cell of a text file unchanged.

    Raises:
        DataError: the table has no such column.
    """
    columns = {name: table.column(name, "--id") for name in names}
    return {name: [_id_text(cell) for cell in cells_N] for name, cells_N in columns.items()}


def _id_text(cell: Any) -> str:
    if cell is None or cell != cell:
        return ""
    return cell if isinstance(cell, str) else to_category(cell)
