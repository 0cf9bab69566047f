"""Read sentences from CoNLL files: a token and its tag per line, and an empty line between sentences.

In CoNLL files, a tab or spaces separate the columns. The first column is the token, and the last column is the tag. A
line with the token ``-DOCSTART-`` ends a sentence and has no other effect. JSON Lines have an object per sentence, with
a list of tokens and a list of their tags. Files are UTF-8. No message contains a token or a tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.data.download import open_decompressed
from fedlearn.data.json_lines import is_json_lines, read_objects
from fedlearn.errors import DataError

SUFFIXES = frozenset((".bio", ".bioes", ".conll", ".iob", ".iob2", ".jsonl", ".ner", ".tsv", ".txt"))
DOCUMENT_START = "-DOCSTART-"
TOKEN_NAMES = ("tokens", "words")  # names of the list of tokens in JSON Lines
TAG_NAMES = ("tags", "ner_tags", "labels", "pos_tags")
JSON_EXAMPLE = 'a line such as {"tokens": ["Ada", "left"], "tags": ["B-PER", "O"]}'
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Hold the tokens of a sentence.

    Args:
        tokens: tokens in their order.
        tags: tag of each token; empty if the file was read without tags.
        first_line: number of the line of the first token.
        has_token_lines: whether each further token is on the next line; otherwise all tokens are on the first line.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...] = ()
    first_line: int = 1
    has_token_lines: bool = True

    def line_of(self, position: int) -> int:
        """Return the number of the line of a token."""
        return self.first_line + position * self.has_token_lines


def is_token_file(file: Path) -> bool:
    """Return whether the name of a file ends as the name of a CoNLL file, or of JSON Lines."""
    return file.suffix.lower() in SUFFIXES


def read_sentences(file: Path, *, has_tags: bool = True) -> Iterator[Sentence]:
    """Yield the sentences of a CoNLL file, or of JSON Lines.

    Args:
        file: file in UTF-8.
        has_tags: whether the sentences have tags. If not, only tokens are read.

    Raises:
        DataError: a line has no tag or another number of columns or tags, or the file has no token; the message names
            the line.
    """
    is_empty = True
    for sentence in _json_sentences(file, has_tags) if is_json_lines(file) else _conll_sentences(file, has_tags):
        is_empty = False
        yield sentence
    if is_empty:
        raise DataError(f"{file} has no token\n  advice    a file with a token and its tag per line")


def _json_sentences(file: Path, has_tags: bool) -> Iterator[Sentence]:
    for number, content in read_objects(file):
        tokens = _strings(file, number, content, TOKEN_NAMES)
        tags = _strings(file, number, content, TAG_NAMES) if has_tags else ()
        if has_tags and len(tags) != len(tokens):
            problem = f"{file}, line {number}, has {len(tokens)} tokens and {len(tags)} tags"
            raise DataError(f"{problem}\n  expected  a tag per token\n  advice    correct this line")
        if tokens:
            yield Sentence(tokens=tokens, tags=tags, first_line=number, has_token_lines=False)


def _strings(file: Path, number: int, content: dict[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the list under the only present name. Numbers of tags become text."""
    place, present = f"{file}, line {number},", [name for name in names if name in content]
    if len(present) != 1:
        found = f"has {' and '.join(present)}" if present else f"has no {' or '.join(names)}"
        raise DataError(f"{place} {found}\n  expected  one of these lists\n  advice    {JSON_EXAMPLE}")
    values = content[present[0]]
    kinds = (str, int) if names is TAG_NAMES else (str,)
    is_list = isinstance(values, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    if not is_list or not all(str(value).strip() for value in values):
        problem = f"{place} has something else than a list of text in {present[0]}"
        raise DataError(f"{problem}\n  expected  a list without empty entries\n  advice    {JSON_EXAMPLE}")
    return tuple(str(value).strip() for value in values)


def _conll_sentences(file: Path, has_tags: bool) -> Iterator[Sentence]:
    rows: list[list[str]] = []
    num_columns = 0
    number = first_line = 1
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
    if rows:
        yield _sentence(rows, first_line, has_tags)


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
