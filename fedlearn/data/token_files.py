"""Read sentences from CoNLL files: a token and its tag per line, and an empty line between sentences.

A tab or spaces separate the columns. The first column is the token, and the last column is the tag. A line with the
token ``-DOCSTART-`` ends a sentence and has no other effect. Files are UTF-8. No message contains a token or a tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlearn.data.download import open_decompressed
from fedlearn.errors import DataError

SUFFIXES = frozenset((".bio", ".bioes", ".conll", ".iob", ".iob2", ".ner", ".tsv", ".txt"))
DOCUMENT_START = "-DOCSTART-"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Hold the tokens of a sentence.

    Args:
        tokens: tokens in their order.
        tags: tag of each token; empty if the file was read without tags.
        first_line: number of the line of the first token. The other tokens are on the next lines.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...] = ()
    first_line: int = 1


def is_token_file(file: Path) -> bool:
    """Return whether the name of a file ends as the name of a CoNLL file."""
    return file.suffix.lower() in SUFFIXES


def read_sentences(file: Path, *, has_tags: bool = True) -> Iterator[Sentence]:
    """Yield the sentences of a CoNLL file.

    Args:
        file: file in UTF-8.
        has_tags: whether the last column is a tag. If not, all columns but the first are ignored.

    Raises:
        DataError: a line has no tag or another number of columns, or the file has no token; the message names the line.
    """
    rows: list[list[str]] = []
    num_columns = 0
    number = first_line = 1
    is_empty = True
    for number, line in _lines(file):
        cells = _cells(line)
        if not cells or cells[0] == DOCUMENT_START:
            if rows:
                yield _sentence(rows, first_line, has_tags)
            rows = []
            continue
        if has_tags:
            num_columns = num_columns or len(cells)
            _check_columns(file, number, cells, num_columns)
        first_line = first_line if rows else number
        rows.append(cells)
        is_empty = False
    if rows:
        yield _sentence(rows, first_line, has_tags)
    if is_empty:
        raise DataError(f"{file} has no token\n  advice    a file with a token and its tag per line")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with open_decompressed(file) as raw:
        for number, line in enumerate(raw, start=1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                problem = f"{file}, line {number}, is not UTF-8"
                raise DataError(f"{problem}\n  advice    this file in UTF-8") from None  # the cause has the content
            yield number, text.rstrip("\r\n")


def _cells(line: str) -> list[str]:
    """Return the columns of a line; none for an empty line."""
    if not line.strip():
        return []
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()


def _check_columns(file: Path, number: int, cells: list[str], num_columns: int) -> None:
    expected = "a token and its tag, separated by a tab or spaces"
    has_both = len(cells) > 1 and cells[0] and cells[-1]
    if not has_both or len(cells) != num_columns:
        problem = f"{len(cells)} columns, but the first line has {num_columns}" if has_both else "no token or no tag"
        raise DataError(f"{file}, line {number}, has {problem}\n  expected  {expected}\n  advice    correct this line")


def _sentence(rows: list[list[str]], first_line: int, has_tags: bool) -> Sentence:
    tags = tuple(cells[-1] for cells in rows) if has_tags else ()
    return Sentence(tokens=tuple(cells[0] for cells in rows), tags=tags, first_line=first_line)
