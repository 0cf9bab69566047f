"""Read and write schemas as YAML files.

Each scalar in the file is text until its key says that it is a number. So ``levels: [no, 007, 1e5]`` are three texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedlearn.data.schema import ColumnSchema, TableSchema
from fedlearn.errors import DataError, did_you_mean

MAX_BYTES = 4 * 2**20
NULLS = ("", "null", "~")
PAIRS = ("range", "scale")
LISTS = ("levels", "names", "missing", "hold_out")
MARKS = ("decimal", "thousands", "separator")
SEPARATOR_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}
HEADER = "# Schema of a table. Give the same file to all sites: scenario.schema=FILE\n"


class _TextLoader(yaml.BaseLoader):
    """Load all scalars as text, and refuse a key that occurs twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if duplicates := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{duplicates[0]} occurs twice", node.start_mark)
        return dict(super().construct_mapping(node, deep=deep))


def read_schema(file: Path) -> TableSchema:
    """Read a schema.

    Args:
        file: YAML file; its keys are the arguments of `TableSchema` and `ColumnSchema`. A column may be only a type,
            e.g. ``age: number``.

    Raises:
        DataError: the file cannot be read, or has a wrong key or value; the message names the key.
    """
    content = _mapping(_load(file), f"{file.name}")
    entries = _mapping(content.pop("columns", {}), f"{file.name}: columns")
    columns = {}
    for name, entry in entries.items():
        description = {"type": entry} if isinstance(entry, str) else _mapping(entry, f"{file.name}: {name}")
        columns[name] = _record(ColumnSchema, description, f"{file.name}: columns: {name}")
    schema: TableSchema = _record(TableSchema, content, file.name, columns=columns)
    return schema


def write_schema(schema: TableSchema, file: Path) -> None:
    """Write a schema as a YAML file that `read_schema` reads."""
    content = {key: value for key, value in _content(schema).items() if key != "columns"}
    columns = {name: _content(column) for name, column in schema.columns.items()}
    head = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120) if content else ""
    body = yaml.safe_dump({"columns": columns}, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    file.write_text(HEADER + head + body, encoding="utf-8")


def _load(file: Path) -> Any:
    try:
        raw = file.read_bytes()
        if len(raw) > MAX_BYTES:
            raise DataError(f"{file.name} is too large for a schema\n  advice    a YAML file with one entry per column")
        return yaml.load(raw.decode("utf-8-sig"), Loader=_TextLoader)
    except OSError as error:
        fix = "simulations.data inspect PATH target=COLUMN --write-schema FILE, which writes a schema"
        raise DataError(f"scenario.schema is {file}: {error.strerror}\n  advice    {fix}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file.name} is no YAML: {reason}\n  try       columns: {{age: {{type: number}}}}") from error


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise DataError(f"{source} has no keys\n  expected  lines KEY: VALUE\n  try       columns: {{age: number}}")
    return dict(value)


def _record(kind: type[Any], content: Mapping[str, Any], source: str, **parts: Any) -> Any:
    """Build a record from texts; an error names the file and the column."""
    known = [field.name for field in fields(kind)]
    for key in content:
        if key not in known:
            closest = did_you_mean(key, known) or known[0]
            raise DataError(
                f"{source} has the unknown key {key}\n  expected  one of {', '.join(known)}\n  advice    {closest}:"
            )
    try:
        values = {key: _value(key, value) for key, value in content.items()}
        return kind(**parts, **{key: value for key, value in values.items() if value is not None})
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except TypeError as error:
        raise DataError(
            f"{source} has no type\n  expected  type: number, or another type\n  try       type: number"
        ) from error


def _value(key: str, value: Any) -> Any:
    if key in LISTS or key in PAIRS:
        return _list(key, value)
    if not isinstance(value, str):
        raise DataError(f"{key} is a list or a mapping\n  expected  one value\n  advice    {key}: VALUE")
    if key in MARKS:
        return SEPARATOR_NAMES.get(value, value)
    return None if value in NULLS else value


def _list(key: str, value: Any) -> tuple[Any, ...] | None:
    if value in NULLS:
        return None
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise DataError(f"{key} is no list of values\n  expected  values in brackets\n  try       {key}: [1, 2]")
    if key not in PAIRS:
        return tuple(items)
    try:
        return tuple(float(item) for item in items)
    except ValueError:
        raise DataError(f"{key} is {items}\n  expected  two numbers\n  try       {key}: [0, 100]") from None


def _content(record: Any) -> dict[str, Any]:
    """Return the fields of a record that differ from their defaults, as YAML writes them."""
    content = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if value != item.default:
            content[item.name] = (
                list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value
            )
    return content
