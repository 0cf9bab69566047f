"""Read tables from text files: CSV and TSV in the forms that programs and people write.

- encodings: UTF-8 with or without a byte order mark, UTF-16, and by a guess GB18030 and Windows-1252
- separators: comma, semicolon, tab, vertical bar, and the line ``sep=;`` of Excel
- lines above the header: titles, comments and empty lines are skipped
- rows: empty rows are skipped; a row with another number of cells is an error

The library pyarrow splits plain files, see `fedlearn.data.arrow_csv`. The module `csv` splits all others: it streams
rows, needs no extra, and refuses broken quotes.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import numpy as np

from fedlearn.data.arrow_csv import split_plain_text
from fedlearn.data.cell_formats import PLAIN
from fedlearn.data.download.decompress import open_decompressed
from fedlearn.data.schema import SEPARATORS
from fedlearn.data.tables import Table, check_header, text_cells
from fedlearn.data.text_encoding import detect_encoding
from fedlearn.errors import DataError

MAX_CELL_CHARS = 2**24  # characters in one cell
CHUNK_BYTES = 2**20
NUM_SAMPLE_LINES = 100  # lines from which the layout is detected
MAX_LINES_ABOVE = 30  # lines above the header
ZIP_MAGIC = b"PK\x03\x04"
UNNAMED_PREFIX = "Unnamed: "
UNNAMED = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")  # pandas names a column without a name so
EXCEL_SEPARATOR = re.compile(r'"?sep=(.)"?')
NAMES_OF_LABELS = frozenset(
    (
        "index",
        "level_0",
        "row",
        "rownames",
        "row_names",
        "row.names",
        "row_number",
        "row_id",
        "rowid",
        "idx",
        "id",
        "nr",
    )
)
MIN_ROWS_OF_LABELS = 10  # rows from which consecutive numbers are row labels

Row = tuple[int, list[str]]  # number of the row in its file, and its cells


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Hold the layout of a text file.

    Args:
        separator: text between two cells.
        header: names of the columns.
        header_row: number of the row of the header, >= 1.
        encoding: encoding of the file.
        notes: decisions about the reading that a user may want to see.
    """

    separator: str
    header: tuple[str, ...]
    header_row: int
    encoding: str = "utf-8"
    notes: tuple[str, ...] = ()


def read_text_table(file: Path, *, encoding: str | None = None, separator: str | None = None) -> Table:
    """Read a table from a text file; see `fedlearn.data.tables.read_table`.

    Raises:
        DataError: the file cannot be read as a table; the message names the row.
    """
    with open_table(file, encoding=encoding, separator=separator) as (layout, lines):
        table = _plain_table(file, layout) or _checked_table(file, layout, list(lines))
    return _with_row_labels(file, table, layout)


def _plain_table(file: Path, layout: Layout) -> Table | None:
    """Return the table of a file that pyarrow can split, or None."""
    with _open_bytes(file) as raw:
        data = raw.read()
    try:
        text = data if layout.encoding == "utf-8" else data.decode(layout.encoding).encode()
    except UnicodeError:
        return None
    names = _full_names(layout.header)
    if len(set(names)) < len(names):
        return None
    columns = split_plain_text(text, names, separator=layout.separator, header_row=layout.header_row)
    if columns is None:
        return None
    num_rows = len(next(iter(columns.values())))
    sample = zip(*(cells_N[:NUM_SAMPLE_LINES] for cells_N in columns.values()), strict=True)
    _check_first_row(file, layout.header, [[cell or "" for cell in row] for row in sample])
    return Table(columns, ((file.name, layout.header_row + 1, num_rows),))


def _checked_table(file: Path, layout: Layout, rows: Sequence[Row]) -> Table:
    """Return the table of any file, after a check of its header and its rows."""
    check_header(file, [name for name in layout.header if not UNNAMED.fullmatch(name)])
    _check_first_row(file, layout.header, [cells for _, cells in rows[:NUM_SAMPLE_LINES]])
    return table_of_rows(file, layout.header, rows)


def _full_names(header: Sequence[str]) -> list[str]:
    return [name or f"{UNNAMED_PREFIX}{place}" for place, name in enumerate(header)]


def read_text_batches(file: Path, batch_size: int) -> Iterator[Table]:
    """Yield a table in parts of ``batch_size`` rows.

    Raises:
        DataError: the file cannot be read as a table; the message names the row.
    """
    with open_table(file) as (layout, lines):
        named = [name for name in layout.header if name]
        check_header(file, named)
        is_first = True
        while rows := list(islice(lines, batch_size)):
            if is_first:
                _check_first_row(file, layout.header, [cells for _, cells in rows[:NUM_SAMPLE_LINES]])
            is_first = False
            table = table_of_rows(file, layout.header, rows)
            columns = {name: cells_N for name, cells_N in table.columns.items() if name in named}
            yield Table(columns, table.origins, row_numbers=table.row_numbers, notes=layout.notes)


@contextmanager
def open_table(
    file: Path, *, encoding: str | None = None, separator: str | None = None
) -> Iterator[tuple[Layout, Iterator[Row]]]:
    """Open a text file as its layout and its rows below the header.

    Args:
        file: text file, perhaps compressed.
        encoding: encoding; None detects it.
        separator: separator; None detects it.

    Raises:
        DataError: the file is empty, or a row cannot be read.
    """
    notes = []
    if encoding is None:
        encoding, is_guess = _encoding_of(file)
        notes = [f"{file.name}: read as {encoding}, a guess"] if is_guess else []
    with _open_bytes(file) as raw:
        stream = cast(TextIO, io.TextIOWrapper(raw, encoding=encoding, newline=""))
        try:
            lines = _lines(file, stream)
            sample = list(islice(lines, NUM_SAMPLE_LINES))
            layout = _detect_layout(file, sample, separator, notes)
            rows = _rows(file, chain(sample, lines), layout)
            yield replace(layout, encoding=encoding), rows
        except UnicodeError as error:
            fix = "scenario.schema=FILE with the line encoding: latin-1, or another encoding"
            raise DataError(f"{file.name} is not {encoding}\n  advice    {fix}") from error


@contextmanager
def _open_bytes(file: Path) -> Iterator[BinaryIO]:
    with open_decompressed(file) as raw:
        start = raw.read(len(ZIP_MAGIC))
        raw.seek(0)
        if start != ZIP_MAGIC:
            yield raw
            return
        try:
            with zipfile.ZipFile(raw) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/")]
                if len(names) != 1:
                    fix = "an archive with one CSV file"
                    raise DataError(f"{file.name} contains {len(names)} files\n  advice    {fix}")
                with archive.open(names[0]) as member:
                    yield cast(BinaryIO, member)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{file.name} is a damaged or encrypted archive\n  advice    a .csv.gz file") from error


def _encoding_of(file: Path) -> tuple[str, bool]:
    with _open_bytes(file) as raw:
        return detect_encoding(iter(lambda: raw.read(CHUNK_BYTES), b""))


def _lines(file: Path, stream: TextIO) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if "\0" in line:
            fix = "saving the file as CSV again, in UTF-8"
            raise DataError(f"{file.name}, row {number} contains zero bytes\n  advice    {fix}")
        yield line


def _rows(file: Path, lines: Iterable[str], layout: Layout) -> Iterator[Row]:
    """Yield the rows below the header that have a cell."""
    csv.field_size_limit(MAX_CELL_CHARS)
    number, width = 0, len(layout.header)
    reader = csv.reader(lines, delimiter=layout.separator, strict=True, skipinitialspace=True)
    try:
        for number, cells in enumerate(reader, start=1):
            is_empty = not any(map(str.strip, cells)) and (width > 1 or not cells)
            if number > layout.header_row and not is_empty:
                yield number, cells
    except csv.Error as error:
        reason = "a quotation mark is not closed" if "end of data" in str(error) else str(error)
        fix = "correcting the quotation marks of the row"
        raise DataError(f"{file.name}, row {number + 1}: {reason}\n  advice    {fix}") from error


def _detect_layout(file: Path, sample: Sequence[str], separator: str | None, notes: Sequence[str]) -> Layout:
    if not any(line.strip() for line in sample):
        raise DataError(
            f"{file.name} is empty\n  advice    a header with the names of the columns, followed by the rows"
        )
    declared = EXCEL_SEPARATOR.fullmatch(sample[0].strip())
    is_tsv = ".tsv" in [suffix.lower() for suffix in file.suffixes]
    separator = separator or (declared[1] if declared else "\t" if is_tsv else _detect_separator(sample))
    rows = _split(sample, separator)
    if declared:
        rows[0] = []
    place = _header_place(rows)
    header = [name.strip() for name in rows[place]]
    width = _usual_width(rows)
    header += [""] * (width - len(header) if any(not row[-1].strip() for row in rows if len(row) == width) else 0)
    titles = sum(1 for row in rows[:place] if any(map(str.strip, row)))
    above = [f"{file.name}: {titles} line{'s' * (titles > 1)} above the header left out"] if titles else []
    return Layout(separator=separator, header=tuple(header), header_row=place + 1, notes=(*notes, *above))


def _split(lines: Sequence[str], separator: str) -> list[list[str]]:
    try:
        return [*csv.reader(lines, delimiter=separator, skipinitialspace=True)]
    except csv.Error:
        return [line.split(separator) for line in lines]


def _detect_separator(sample: Sequence[str]) -> str:
    """Return the separator with which most lines have the same number of cells."""

    def score(separator: str) -> tuple[float, int, int]:
        rows = [row for row in _split(sample, separator) if row]
        width = _usual_width(rows)
        share = sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0
        return share, width, -SEPARATORS.index(separator)

    return max(SEPARATORS, key=score)


def _usual_width(rows: Sequence[Sequence[str]]) -> int:
    widths = [len(row) for row in rows if row]
    return max(set(widths), key=lambda width: (widths.count(width), width), default=1)


def _header_place(rows: Sequence[Sequence[str]]) -> int:
    """Return the place of the header: the first row that is no title and no comment."""
    width = _usual_width(rows)
    for place, row in enumerate(rows[:MAX_LINES_ABOVE]):
        num_filled = sum(bool(cell.strip()) for cell in row)
        is_comment = bool(row) and row[0].startswith("#") and len(row) != width
        is_title = width > 1 and (num_filled <= max(1, width // 2) or is_comment)
        has_header_below = any(_is_header(below, width) for below in rows[place + 1 : MAX_LINES_ABOVE])
        if num_filled and not (is_title and has_header_below):
            return place
    return next(place for place, row in enumerate(rows) if any(map(str.strip, row)))


def _is_header(row: Sequence[str], width: int) -> bool:
    """Return whether each cell of a row can be the name of a column. The first and the last names may be absent."""
    names = [cell.strip() for cell in row]
    while names and not names[-1]:
        names.pop()
    inner = names[1:] if names and not names[0] else names
    is_complete = len(row) >= width - 1 and 2 * len(names) > width and all(inner) and len(set(inner)) == len(inner)
    return is_complete and not any(map(_is_number, inner))


def _is_number(cell: str) -> bool:
    values_N, invalid_N = PLAIN.parse_column(np.array([cell.strip()], object))
    return bool(~invalid_N[0] & ~np.isnan(values_N[0]))


def _check_first_row(file: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Refuse a file whose first row has values instead of names."""
    numbers = [float(name) for name in header if _is_number(name)]
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    are_years = all(1800 <= number <= 2200 and number.is_integer() for number in numbers)
    are_places = (
        steps <= {1.0} and numbers[:1] in ([], [0.0], [1.0]) and len(numbers) in (0, *range(2, len(header) + 1))
    )
    is_data = bool(numbers) and not (are_places or (are_years and all(step > 0 for step in steps)))
    columns = [{row[place].strip() for row in rows if place < len(row)} for place in range(len(header))]
    is_repeated = len(rows) > 1 and all(name in cells for name, cells in zip(header, columns, strict=True))
    if is_data or is_repeated:
        fix = "a first row with the names of the columns"
        raise DataError(f"{file.name} has no header: its first row has values\n  advice    {fix}")


def table_of_rows(file: Path, header: Sequence[str], rows: Sequence[Row]) -> Table:
    """Return the table of some rows of a text file. Empty cells after the last column are left out.

    Raises:
        DataError: a row has another number of cells than the header.
    """
    width = len(header)
    for number, cells in rows:
        if len(cells) != width:
            if len(cells) > width and not any(map(str.strip, cells[width:])):
                continue
            few = "the missing cells of this row, as empty cells between separators"
            fix = few if len(cells) < width else "quotation marks around cells that contain the separator"
            reason = f"{len(cells)} cells, but the header has {width} columns"
            raise DataError(f"{file.name}, row {number} has {reason}\n  advice    {fix}")
    columns = {name: text_cells([cells[place] for _, cells in rows]) for place, name in enumerate(_full_names(header))}
    numbers = np.array([number for number, _ in rows], np.int64)
    first = int(numbers[0]) if len(numbers) else 2
    return Table(columns, ((file.name, first, len(rows)),), row_numbers=numbers)


def _with_row_labels(file: Path, table: Table, layout: Layout) -> Table:
    """Return the table without empty unnamed columns, and with the names of its row labels.

    Raises:
        DataError: a column without a name has cells, and is not the first column with a different cell in each row.
    """
    columns, labels, notes = {}, set(), [*layout.notes]
    for place, (name, cells_N) in enumerate(table.columns.items()):
        is_unnamed = UNNAMED.fullmatch(name) is not None
        num_present = len(cells_N) - cells_N.tolist().count(None)
        if is_unnamed and not num_present and len(cells_N):
            notes.append(f"{file.name}: column {place + 1} has no name and no cells, left out")
            continue
        is_distinct = is_unnamed and len(set(cells_N.tolist())) == num_present == len(cells_N)
        if is_unnamed and len(cells_N) and not (place == 0 and is_distinct):
            fix = f"a name for column {place + 1} in the first row"
            raise DataError(f"{file.name}, column {place + 1} is a column without a name\n  advice    {fix}")
        if is_unnamed or (name.lower() in NAMES_OF_LABELS and _are_consecutive(cells_N)):
            labels.add(name)
        columns[name] = cells_N
    return Table(
        columns, table.origins, row_numbers=table.row_numbers, notes=tuple(notes), row_labels=frozenset(labels)
    )


def _are_consecutive(cells_N: np.ndarray) -> bool:
    values_N, invalid_N = PLAIN.parse_column(cells_N)
    if len(values_N) < MIN_ROWS_OF_LABELS or invalid_N.any():
        return False
    return values_N[0] in (0, 1) and bool((np.diff(values_N) == 1).all())
