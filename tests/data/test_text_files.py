"""Text files are read in the forms that programs and people write. All forms give the same table."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlearn.data import text_files
from fedlearn.data.example_files import read_table_batches
from fedlearn.data.tables import concat_tables, read_table
from fedlearn.data.text_encoding import detect_encoding
from fedlearn.data.typed_tables import Reading, type_table
from fedlearn.errors import DataError

HEADER, ROWS = "x,c,y", ["1.5,u,0", "2.5,v,1", "-3.5,w,0", "4.5,u,1"]


def lines(*rows, end="\n"):
    return end.join([*rows, ""])


def zipped(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", data)
    return buffer.getvalue()


PLAIN = lines(HEADER, *ROWS)
FORMS = {
    "plain": PLAIN.encode(),
    "byte order mark": PLAIN.encode("utf-8-sig"),
    "crlf": lines(HEADER, *ROWS, end="\r\n").encode(),
    "cr": lines(HEADER, *ROWS, end="\r").encode(),
    "utf-16": PLAIN.replace(",", "\t").encode("utf-16"),
    "utf-16-le": PLAIN.encode("utf-16-le"),
    "utf-16-be": PLAIN.encode("utf-16-be"),
    "utf-32": PLAIN.encode("utf-32"),
    "semicolons": PLAIN.replace(",", ";").encode(),
    "semicolons and decimal commas": PLAIN.replace(",", ";").replace(".", ",").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "bars": PLAIN.replace(",", "|").encode(),
    "sep": lines("sep=;", PLAIN.replace(",", ";")).encode(),
    "spaces": PLAIN.replace(",", " , ").encode(),
    "quotes": PLAIN.replace("u", '"u"').replace(",", ", ").encode(),
    "blank lines": lines("", HEADER, "", *ROWS[:2], "", *ROWS[2:], "", "").encode(),
    "empty rows": lines(HEADER, *ROWS, ",,", " , , ").encode(),
    "comment": lines("# exported 2026", "# by a program", HEADER, *ROWS).encode(),
    "comment with separators": lines("# a, b", HEADER, *ROWS).encode(),
    "title": lines("Clinic north,,", "", HEADER, *ROWS).encode(),
    "trailing separators": lines(HEADER + ",", *[row + "," for row in ROWS]).encode(),
    "trailing separators of rows": lines(HEADER, *[row + "," for row in ROWS]).encode(),
    "unnamed index": lines("," + HEADER, *[f"{n},{row}" for n, row in enumerate(ROWS)]).encode(),
    "unnamed index of R": lines('""' + "," + HEADER, *[f'"{n}",{row}' for n, row in enumerate(ROWS, 1)]).encode(),
    "index of pandas": lines("Unnamed: 0," + HEADER, *[f"{7 * n},{row}" for n, row in enumerate(ROWS)]).encode(),
    "empty unnamed": lines(HEADER + ",Unnamed: 3", *[row + "," for row in ROWS]).encode(),
    "gzip": gzip.compress(PLAIN.encode()),
    "zip": zipped(PLAIN),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_file_is_the_same_table(tmp_path, form):
    (tmp_path / "a.csv").write_bytes(FORMS[form])
    table = type_table(read_table(tmp_path / "a.csv"))
    assert list(table.columns) == ["x", "c", "y"]
    assert table.columns["x"].tolist() == [1.5, 2.5, -3.5, 4.5]
    assert table.columns["c"].tolist() == ["u", "v", "w", "u"]
    new = [*read_table_batches(tmp_path / "a.csv", 3)]
    assert [cell for part in new for cell in part.columns["c"]] == ["u", "v", "w", "u"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("größe,naïve\nÄpfel,é\n", "cp1252"),
        ("name,stadt\nMüller,Köln\nStraße,Zürich\n", "latin-1"),
        ("性别,年龄\n男,30\n女,31\n", "gb18030"),
        ("医院名称,费用\n北京协和医院,30\n上海华山医院,31\n", "gb18030"),
        ("性别,年龄\n男,30\n", "utf-8"),
        ("性别,年龄\n男,30\n", "utf-16"),
    ],
)
def test_a_guessed_encoding_is_read_and_shown(tmp_path, text, encoding):
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    table = read_table(tmp_path / "a.csv")
    assert list(table.columns) == text.split("\n")[0].split(",")
    is_guess = encoding not in ("utf-8", "utf-16")
    assert any("a guess" in note for note in table.notes) == is_guess


def test_utf8_may_be_split_between_two_parts():
    data = "a,é\n".encode()
    assert detect_encoding([data[:3], data[3:]]) == ("utf-8", False)


def test_a_stated_encoding_is_not_guessed(tmp_path):
    (tmp_path / "a.csv").write_bytes("größe\n1\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a\.csv is not utf-8\n  advice    .*encoding"):
        read_table(tmp_path / "a.csv", encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1.5,u\n2.5,v\n", "has no header"),
        ("63,1,3,145\n37,1,2,130\n", "has no header"),
        ("u,no\nv,yes\nu,yes\nv,no\n", "has no header"),
        ("a,b\n1,2\n3\n", "row 3 has 1 cells"),
        ("a,b\n1,2\n\n3,4,5\n", "row 4 has 3 cells"),
        ('a,b\n"1\n2",2\n3\n', "row 3 has 1 cells"),
        ('a,b\n1,2\n"3,4\n5,6\n', "row 3: a quotation mark is not closed"),
        ("a,b\n1,2\n3,\0\n", "row 3 contains zero bytes"),
        ("a,,b\n1,2,3\n", "column 2 is a column without a name"),
        (",a\nx,1\nx,2\n", "column 1 is a column without a name"),
        ("Unnamed: 0,a\nx,1\nx,2\n", "column 1 is a column without a name"),
        ("a,a\n1,2\n", "the column a twice"),
        ("\n\n", "is empty"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, text, reason):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=reason) as error:
        read_table(tmp_path / "a.csv")
    assert len(str(error.value).splitlines()) in (2, 3)


@pytest.mark.parametrize("header", ["2019,2020,2021", "0,1,2", "1,2,3"])
def test_numbers_may_be_names_of_columns(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\n5,6.5,7\n8,9.5,1\n")
    assert list(read_table(tmp_path / "a.csv").columns) == header.split(",")


def test_a_new_file_without_header_is_named(tmp_path):
    (tmp_path / "new.csv").write_text("1.5,u\n2.5,v\n")
    with pytest.raises(DataError, match=r"new\.csv has no header: its first row has values\n  advice    .*names"):
        next(read_table_batches(tmp_path / "new.csv", 10))


def test_an_archive_of_two_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("a.csv", PLAIN)
        archive.writestr("b.csv", PLAIN)
    with pytest.raises(DataError, match="contains 2 files"):
        read_table(tmp_path / "a.csv.zip")


def test_rows_keep_their_numbers_across_blank_lines_and_files(tmp_path):
    (tmp_path / "a.csv").write_text("# c\nx,y\n\n1,2\n\nold,4\n")
    (tmp_path / "b.csv").write_text("x,y\n5,6\n")
    table = concat_tables([read_table(tmp_path / "a.csv"), read_table(tmp_path / "b.csv")])
    assert [table.row_location(row) for row in range(3)] == ["a.csv, row 4", "a.csv, row 6", "b.csv, row 2"]


def test_consecutive_numbers_called_index_are_row_labels(tmp_path):
    (tmp_path / "a.csv").write_text(lines("Index,n,y", *[f"{n},{n},{n % 2}" for n in range(12)]))
    table = read_table(tmp_path / "a.csv")
    assert list(type_table(table).columns) == ["n", "y"]
    assert "Index: row labels, left out" in type_table(table).notes
    assert "Index" in type_table(table, Reading(used=["Index"])).columns
    np.testing.assert_array_equal(type_table(table).columns["n"], np.arange(12.0))


CELL = st.text(st.characters(codec="utf-8", exclude_characters='",;|\t\r\n\0', exclude_categories=("Cc",)), max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6))
def test_both_readers_give_the_same_cells(tmp_path, monkeypatch, rows):
    (tmp_path / "a.csv").write_text("".join(f"{','.join(row)}\n" for row in [("p", "q", "r"), *rows]), encoding="utf-8")

    def outcome():
        try:
            table = read_table(tmp_path / "a.csv")
        except DataError as error:
            return str(error)
        return {name: cells.tolist() for name, cells in table.columns.items()}, table.row_location(len(table) - 1)

    with monkeypatch.context() as patch:
        patch.setattr(text_files, "split_plain_text", lambda *args, **options: None)
        expected = outcome()
    assert outcome() == expected


def test_plain_files_are_split_by_pyarrow(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    monkeypatch.setattr(text_files, "_checked_table", None)
    (tmp_path / "a.csv").write_text(PLAIN)
    assert len(read_table(tmp_path / "a.csv")) == 4
