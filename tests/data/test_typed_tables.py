"""Types of columns are decided once for all files, and an error names file, row and column, but no cell."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal

import numpy as np
import pytest

from fedlearn.data.column_types import Category, Number
from fedlearn.data.encoding import encode_targets
from fedlearn.data.federated_statistics import add_sums, column_sums
from fedlearn.data.inputs import TableInputs
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.schema import ColumnSchema, TableSchema
from fedlearn.data.table_settings import table_settings
from fedlearn.data.tables import concat_tables, read_table, table_from_columns
from fedlearn.data.typed_tables import Reading, type_table
from fedlearn.errors import DataError, SettingError


def tables(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return concat_tables([read_table(folder / f"{name}.csv") for name in files])


def column(*cells):
    return "\n".join(["k,x", *(f'k,"{cell}"' for cell in cells), ""])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"a": column("1", "2"), "b": column("low", "high")},
            r"b\.csv, row 2, column x: text, but a\.csv has only numb",
        ),
        ({"a": column(*range(9)), "b": column(*["low", "high"] * 8)}, r"b\.csv, row 2, column x: text, but a\.csv has"),
        ({"a": column("1", "2", "3", "SECRET")}, r"a\.csv, row 5, column x: not a number"),
        ({"a": column("1.5", "2.5", "SECRET,1")}, r"a\.csv, row 4, column x: not a number"),
        ({"a": column("12 mg", "13 mg"), "b": column("14 g", "15 mg")}, r"b\.csv, row 2, column x: .*another unit"),
        ({"a": column("12 mg", "13 mg"), "b": column("14", "15")}, r"row 2, column x: .*without the unit"),
        ({"a": column("1.5", "2.5"), "b": column("1,5", "2,5")}, r"b\.csv, row 2, column x: .*marks"),
        ({"a": column("2024-01-31", "2024-02-01"), "b": column("3.4.2024")}, r"b\.csv, row 2, column x: not a date"),
        ({"a": column("1", "1e300")}, r"a\.csv, row 3, column x: infinite, or too large"),
        ({"a": column("1", "-1.7976931348623157e+308")}, r"a\.csv, row 3, column x: infinite, or too large"),
        ({"a": column("1", "inf", "3")}, r"a\.csv, row 3, column x: not a number"),
        ({"a": column("1,234", "2,345")}, r"a\.csv, row 2, column x: .*decimal mark or a thousands mark"),
    ],
)
def test_a_cell_that_differs_is_named_without_its_text(tmp_path, files, reason):
    with pytest.raises(DataError, match=reason) as error:
        type_table(tables(tmp_path, **files))
    for text in files.values():
        for cell in text.replace('"', "").split("\n")[1:-1]:
            assert len(cell) < 5 or cell.split(",", 1)[1] not in str(error.value)
    assert "SECRET" not in str(error.value)


def test_an_ambiguous_column_follows_the_marks_of_the_other_columns(tmp_path):
    table = type_table(tables(tmp_path, a="x;y;z\n36,512;1,5;1.234\n37,100;2,5;2.345\n"))
    assert {name: cells.tolist() for name, cells in table.columns.items()} == {
        "x": [36.512, 37.1], "y": [1.5, 2.5], "z": [1234.0, 2345.0],
    }  # fmt: skip
    assert "x: decimal comma" in table.notes
    assert "z: thousands point" in table.notes


@pytest.mark.parametrize(("cells", "is_noted"), [("5.074 6.123", True), ("5.074 0.123", False), ("5.074 6.1", False),
                                                ("5 6", False)])  # fmt: skip
def test_a_point_that_could_group_thousands_is_a_note(tmp_path, cells, is_noted):
    notes = type_table(tables(tmp_path, a=column(*cells.split()))).notes
    assert any("the point is a decimal mark" in note for note in notes) == is_noted
    assert "5.074" not in " ".join(notes)


def test_decisions_are_notes(tmp_path):
    text = "day,dose,empty\n2024-01-31,5 mg,\n2024-02-01,6 mg,NA\n"
    notes = type_table(tables(tmp_path, a=text)).notes
    many = type_table(tables(tmp_path, b=column(*(f"ward {n}" for n in range(21))))).notes
    assert many == ("x: text with 21 levels",)
    assert notes == ("day: dates, as days since 1970-01-01", "dose: unit mg", "empty: all cells are missing")


@pytest.mark.parametrize(
    "words", [["None", "Mild", "Severe"], ["NA", "ZA", "DE"], ["nan", "null", "true"], ["inf", "?"]]
)
def test_declared_classes_are_no_missing_cells(tmp_path, words):
    table = tables(tmp_path, a=column(*words))
    typed = type_table(table, Reading(levels={"x": words}))
    y_N, _, classes = encode_targets(typed, "x", task=None, classes=words, has_all_clients=True)
    assert (y_N.tolist(), list(classes)) == ([*range(len(words))], words)


def test_a_missing_target_proposes_to_state_the_classes(tmp_path):
    typed = type_table(tables(tmp_path, a=column("None", "Mild", "Severe")))
    with pytest.raises(DataError, match=r"row 2, column x: missing(.|\n)*scenario\.classes") as error:
        encode_targets(typed, "x", task=None, classes=None, has_all_clients=True)
    assert "removing" not in str(error.value)


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["007", "7"], ("007", "7")),
        (["10E2", "11E3"], ("10E2", "11E3")),
        (["1623456789012345600", "1623456789012345601"], ("1623456789012345600", "1623456789012345601")),
        (["10", "9", "1"], ("1", "9", "10")),
        (["1.0", "2"], ("1", "2")),
        (["True", "false"], ("false", "true")),
    ],
)
def test_inferred_classes_keep_their_text(tmp_path, cells, classes):
    typed = type_table(tables(tmp_path, a=column(*cells)))
    assert encode_targets(typed, "x", task=None, classes=None, has_all_clients=True)[2] == classes


def test_classes_that_differ_in_case_only_are_refused(tmp_path):
    typed = type_table(tables(tmp_path, a=column("yes", "Yes", "no")))
    with pytest.raises(SettingError, match="spell one class in two ways"):
        encode_targets(typed, "x", task=None, classes=None, has_all_clients=True)


@pytest.mark.parametrize(("offset", "spread"), [(1e-8, 1e-9), (1.7e9, 60.0), (1.7e18, 6e10), (1e15, 1.0), (0, 1e-200)])
def test_scales_are_relative_to_the_data(offset, spread):
    rng = np.random.default_rng(0)
    values_N = offset + spread * rng.normal(size=1000)
    parts = np.array_split(values_N, 7)
    sums = add_sums(column_sums(table_from_columns({"x": part})) for part in parts)["x"]
    centred_N = (values_N - values_N[0]).astype(np.longdouble) / spread
    assert sums.std / spread == pytest.approx(float(centred_N.std()), rel=1e-9)
    assert sums.mean == pytest.approx(values_N.mean(), rel=1e-12, abs=spread * 1e-6)


@pytest.mark.parametrize("values", [[0.3, 0.1 + 0.2], [5.0, 5.0], [1.7e9] * 3, [0.0, 0.0]])
def test_equal_values_are_constant_despite_rounding(values):
    assert column_sums(table_from_columns({"x": values}))["x"].std == 1


def test_formats_are_stored_with_the_model_and_read_new_cells(tmp_path):
    typed = type_table(tables(tmp_path, a="x;c\n1.234,5 mg;u\n6,5 mg;v\n"))
    number = Number(name="x", format=typed.formats["x"])
    inputs = TableInputs(columns=(number, Category(name="c", levels=("u", "v"))))
    described = Preprocessing(inputs=inputs, target=Target(task="binary", classes=("no", "yes")))
    again = Preprocessing.from_json(described.to_json())
    assert again == described
    new = tables(tmp_path, new="c;x\nv;2.345 mg\n")
    assert again.inputs.transform(new).tolist() == [[2345, 0, 1]]
    with pytest.raises(DataError, match=r"new\.csv, row 2, column x: not a number"):
        again.inputs.transform(tables(tmp_path, new="c;x\nv;2.345 g\n"))


def parquet(path, columns, **index):
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    if index:
        pandas.DataFrame(columns, **index).to_parquet(path)
    else:
        from pyarrow import parquet as format

        format.write_table(arrow.table(columns), path)
    return read_table(path)


@pytest.mark.parametrize("index", [[7, 3, 5], ["p", "q", "r"]])
def test_an_index_of_pandas_is_no_feature(tmp_path, index):
    table = parquet(tmp_path / "a.parquet", {"x": [1, 2, 3]}, index=index)
    assert list(type_table(table).columns) == ["x"]


def test_each_type_of_arrow_has_a_reading(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    big = 1623456789012345600
    columns = {
        "whole": [1, None, 3],
        "id": [big, big + 1, None],
        "big": [big, big + 1, big + 2],
        "decimal": [Decimal("1.50"), None, Decimal(2)],
        "flag": [True, None, False],
        "level": arrow.array(["a", None, "b"]).dictionary_encode(),
        "day": [date(1970, 1, 2), None, date(1970, 1, 3)],
        "moment": [datetime(1970, 1, 1, 12), None, datetime(1970, 1, 2)],
        "clock": [time(12), None, time(6)],
        "span": [timedelta(days=2), None, timedelta(hours=12)],
        "null": arrow.nulls(3),
        "float": arrow.array([1.5, None, float("nan")]),
    }
    table = type_table(parquet(tmp_path / "a.parquet", columns))
    values = {name: cells.tolist() for name, cells in table.columns.items()}
    assert values["id"] == [str(big), str(big + 1), None]
    assert values["big"] == [str(big), str(big + 1), str(big + 2)]
    assert values["flag"] == ["true", None, "false"]
    assert values["level"] == ["a", None, "b"]
    expected = {"whole": [1, 3], "decimal": [1.5, 2], "day": [1, 2], "moment": [0.5, 1], "clock": [0.5, 0.25],
                "span": [2, 0.5], "null": [], "float": [1.5]}  # fmt: skip
    assert {name: [cell for cell in values[name] if cell == cell] for name in expected} == expected


def test_infinities_of_parquet_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet, row 2, column x: infinite"):
        type_table(parquet(tmp_path / "a.parquet", {"x": [1.0, float("inf")]}))


SCHEMA = TableSchema(
    columns={
        "x": ColumnSchema(type="number", unit="mg", range=(0, 100), missing=("", "-9")),
        "sex": ColumnSchema(type="category", levels=("f", "None")),
        "day": ColumnSchema(type="date", format="%d.%m.%Y"),
        "pid": ColumnSchema(type="id"),
        "y": ColumnSchema(type="category", levels=("0", "1"), names=("healthy", "ill")),
    },
    target="y",
    decimal=",",
)
GOOD = "pid;x;sex;day;y\n007;1,5 mg;f;02.01.1970;0\n007;-9;None;;1\n"


def test_a_schema_fixes_the_reading(tmp_path):
    table = type_table(tables(tmp_path, a=GOOD), Reading(schema=SCHEMA))
    assert list(table.columns) == ["x", "sex", "day", "y"]
    np.testing.assert_array_equal(table.columns["x"], [1.5, np.nan])
    np.testing.assert_array_equal(table.columns["day"], [1, np.nan])
    assert table.columns["sex"].tolist() == ["f", "None"]
    assert table.columns["y"].tolist() == ["healthy", "ill"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("1,5 mg", "1.5 mg", "row 2, column x: not a number"),
        ("1,5 mg", "1,5 g", "row 2, column x: not a number"),
        ("1,5 mg", "NA", "row 2, column x: not a number"),
        ("1,5 mg", "101", "row 2, column x: outside the range 0 to 100"),
        ("02.01", "31.02", "row 2, column day: not a date"),
        (";f;", ";m;", "row 2, column sex: not one of the levels"),
        ("sex;", "gender;", "has no column sex, which the schema has"),
        (";sex", ";sex;more", "row 2 has 5 cells"),
    ],
)
def test_a_cell_that_the_schema_excludes_is_named(tmp_path, old, new, reason):
    with pytest.raises(DataError, match=reason) as error:
        type_table(tables(tmp_path, a=GOOD.replace(old, new, 1)), Reading(schema=SCHEMA))
    assert "1,5" not in str(error.value)
    assert "31.02" not in str(error.value)


def test_a_column_that_is_not_in_the_schema_is_named(tmp_path):
    text = "".join(f"{line};{cell}\n" for line, cell in zip(GOOD.split("\n"), ("mass", 1, 2), strict=False))
    with pytest.raises(DataError, match=r"the schema has no column mass"):
        type_table(tables(tmp_path, a=text), Reading(schema=SCHEMA))


def test_a_schema_states_settings(tmp_path):
    from fedlearn.data.schema_files import write_schema

    write_schema(SCHEMA, tmp_path / "s.yaml")
    stated = table_settings(schema=tmp_path / "s.yaml")
    assert (stated.target, stated.classes) == ("y", ("healthy", "ill"))
    assert (stated.scales, stated.bounds) == ({"x": (50.0, 25.0)}, {"x": (0.0, 100.0)})
    assert stated.categories == {"sex": ("f", "None")}
    with pytest.raises(SettingError, match=r"classes is .*\n  expected  null, because the schema states it"):
        table_settings(schema=tmp_path / "s.yaml", classes=["healthy", "ill"])
    with pytest.raises(SettingError, match=r"scales\.x is"):
        table_settings(schema=tmp_path / "s.yaml", scales={"x": [1, 2]})


@pytest.mark.parametrize("name", ["ignore", "scales", "categories", "bounds"])
def test_a_setting_that_names_no_column_is_refused(tmp_path, name):
    table = tables(tmp_path, a="age,y\n1,2\n")
    value = ["agee"] if name == "ignore" else {"agee": [1, 2]}
    with pytest.raises(DataError, match=rf"scenario\.{name} has the name agee\n.*\n  (try|advice)  .*age"):
        table_settings(**{name: value}).require_names(table)


def test_a_single_value_for_a_list_is_one_item():
    stated = table_settings(ignore="patient_age", classes="yes", clients=7, categories={"sex": "f"})
    assert (stated.ignore, stated.classes, stated.clients) == (("patient_age",), ("yes",), (7,))
    assert stated.categories == {"sex": ("f",)}
