from __future__ import annotations

import pytest

from fedlearn.data.schema import ColumnSchema, TableSchema
from fedlearn.data.schema_files import read_schema, write_schema
from fedlearn.errors import DataError

SCHEMA = TableSchema(
    columns={
        "Heart rate (bpm)": ColumnSchema(type="number", unit="bpm", range=(20.0, 250.0), decimal=","),
        "sex": ColumnSchema(type="category", levels=("no", "007", "null", "1e5", "1_0"), names=tuple("abcde")),
        "day": ColumnSchema(type="date", format="%d.%m.%Y"),
        "site": ColumnSchema(type="id", missing=()),
        "null": ColumnSchema(type="ignore"),
    },
    target="sex",
    client="site",
    separator="\t",
    decimal=",",
    thousands=" ",
    missing=("", "-999"),
)


def test_a_schema_is_read_as_it_was_written(tmp_path):
    write_schema(SCHEMA, tmp_path / "schema.yaml")
    assert read_schema(tmp_path / "schema.yaml") == SCHEMA


def test_scalars_of_a_schema_stay_text(tmp_path):
    (tmp_path / "s.yaml").write_text("columns: {a: {type: category, levels: [no, 007, 1e5, null, 12:30, 0x1F]}, b: id}")
    schema = read_schema(tmp_path / "s.yaml")
    assert schema.columns["a"].levels == ("no", "007", "1e5", "null", "12:30", "0x1F")
    assert schema.features == ("a",)
    assert schema.ignored == ("b",)


def test_marks_of_the_table_apply_to_a_column_without_its_marks():
    column = TableSchema(columns={"a": ColumnSchema(type="number", range=(0, 8))}, decimal=",", thousands=".").column(
        "a"
    )
    assert (column.decimal, column.thousands, column.constants) == (",", ".", (4.0, 2.0))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("columns: {a: {typ: number}}", "unknown key typ\n(.|\n)*advice    type:"),
        ("columns: {a: {type: Number}}", "type is Number\n(.|\n)*try       type: number"),
        ("columns: {a: number, a: text}", "a occurs twice"),
        ("columns: {a: {type: category, range: [1, 2]}}", "range is"),
        ("columnz: {a: number}", "unknown key columnz\n(.|\n)*advice    columns:"),
        ("target: b\ncolumns: {bb: number}", "target is b\n(.|\n)*try       target: bb"),
        ("- 1", "no keys"),
        ("columns: {a: {type: number, range: [2, 1]}}", "range is"),
        ("columns: {a: {type: number, scale: [2, 0]}}", "scale is"),
        ("columns: {a: {type: number, range: [low, high]}}", "range is"),
        ("columns: {a: {type: [number]}}", "type is a list"),
        ("columns: {a: {unit: mg}}", "has no type"),
        ("columns: {a: {type: category, levels: [x, x]}}", "levels is"),
        ("columns: {a: {type: category, levels: [x, y], names: [ill]}}", "names is"),
        ("columns: {a: number}\ndecimal: ','\nthousands: ','", "thousands is"),
        ("columns: {a: number}\nseparator: x", "separator is"),
        ("columns: {a: number}\nencoding: utf-9", "encoding is"),
        ("{", "is no YAML"),
        ("a: !!python/object/apply:os.system [echo]", "unknown key a"),
        ("", "has no keys"),
    ],
)
def test_a_wrong_schema_is_refused_with_its_key(tmp_path, text, fault):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(DataError, match=fault) as error:
        read_schema(tmp_path / "s.yaml")
    assert len(str(error.value).splitlines()) in (2, 3)


def test_an_absent_schema_is_named(tmp_path):
    with pytest.raises(DataError, match=r"scenario\.schema is .*\n  advice    .*--write-schema"):
        read_schema(tmp_path / "s.yaml")
