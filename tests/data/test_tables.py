from __future__ import annotations

import gzip
import sys
from datetime import date
from decimal import Decimal

import numpy as np
import pytest

from fedlearn.data.folder import read_contents
from fedlearn.data.image_folders import ImageSettings
from fedlearn.data.tables import concat_tables, read_table, to_categories, to_numbers
from fedlearn.errors import DataError, MissingExtra


def write(path, text, *, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "age,sex\n63,f\n,m\n"),
        ("a.csv", "\ufeffage;sex\r\n63;f\r\nNA;m\r\n\r\n\r\n"),
        ("a.tsv", "age\tsex\n63\tf\n?\tm\n"),
        ("a.csv", ' age , sex \n"63", f\n null,m'),
    ],
)
def test_text_tables_are_read_as_spreadsheets_save_them(tmp_path, name, text):
    table = read_table(write(tmp_path / name, text))
    assert list(table.columns) == ["age", "sex"]
    np.testing.assert_array_equal(to_numbers(table.columns["age"])[0], [63, np.nan])
    assert to_categories(table.columns["sex"]).tolist() == ["f", "m"]
    assert table.row_location(1) == f"{name}, row 3"


def test_a_file_of_another_kind_is_no_table(tmp_path):
    with pytest.raises(DataError, match=r"a\.xlsx is no table\n  expected  .*\n  advice    save it as CSV"):
        read_table(write(tmp_path / "a.xlsx", "age\n1\n"))
    assert len(read_table(write(tmp_path / "A.CSV", "age\n1\n"))) == 1


def test_a_gzipped_table_is_read(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"age\n63\n"))
    assert to_numbers(read_table(tmp_path / "a.csv.gz").columns["age"])[0].tolist() == [63]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("age,sex\n", "has no rows"),
        ("age,age\n1,2\n", "has the column age twice"),
        ("age,\n1,2\n", "a column without a name"),
        ("age,sex\n1,f\n2\n", "row 3 has 1 cells, but the header has 2 columns"),
        ("age,sex\n1,f\n2,m,x\n", "row 3 has 3 cells"),
        ('age,sex\n1,f\n"2,m\n3,f\n', "row 3: a quotation mark is not closed"),
        ("age,sex\n1,\0\n", "row 2 contains zero bytes"),
        ("1.5,f\n2.5,m\n", "has no header"),
        ("u,no\nv,yes\nv,no\nu,yes\n", "has no header"),
        ("age,,sex\n1,2,f\n", "column 2 is a column without a name"),
    ],
)
def test_a_broken_table_is_named_with_its_row(tmp_path, text, reason):
    with pytest.raises(DataError, match=rf"a\.csv.*{reason}"):
        read_table(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize("cell", ["1_000", "inf", "12O", "1,5"])
def test_text_that_resembles_a_number_is_none(cell):
    assert to_numbers(np.array([cell], object))[1].tolist() == [True]


def test_tables_are_joined_by_name_and_rows_keep_their_places(tmp_path):
    item = read_table(write(tmp_path / "one.csv", "age,sex\n1,f\n2,m\n"))
    two = read_table(write(tmp_path / "two.csv", "sex,age\nf,3\n"))
    table = concat_tables([item, two])
    assert to_numbers(table.columns["age"])[0].tolist() == [1, 2, 3]
    assert [table.row_location(row) for row in range(3)] == ["one.csv, row 2", "one.csv, row 3", "two.csv, row 2"]


@pytest.mark.parametrize("text", ["age\n1\n", "age,sex,more\n1,f,2\n"])
def test_a_column_that_not_all_files_have_is_named(tmp_path, text):
    item = read_table(write(tmp_path / "one.csv", "age,sex\n1,f\n"))
    with pytest.raises(DataError, match=r"(two\.csv has no column sex|one\.csv has no column more)"):
        concat_tables([item, read_table(write(tmp_path / "two.csv", text))])


def parquet(path, columns):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet as format

    format.write_table(arrow.table(columns), path)
    return path


def test_parquet_columns_of_each_type_are_read(tmp_path):
    columns = {
        "age": [63, None],
        "weight": [70.5, None],
        "fee": [Decimal("1.5"), None],
        "sex": ["f", None],
        "smoker": [True, None],
        "day": [date(2026, 1, 31), None],
    }
    table = read_table(parquet(tmp_path / "a.parquet", columns))
    for name, value in {"age": 63, "weight": 70.5, "fee": 1.5}.items():
        np.testing.assert_array_equal(to_numbers(table.columns[name])[0], [value, np.nan])
    for name, value in {"sex": "f", "smoker": "true", "day": "2026-01-31"}.items():
        assert to_categories(table.columns[name]).tolist() == [value, None]
    assert table.row_location(1) == "a.parquet, row 2"


def test_parquet_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"a\.parquet, column visits holds list"):
        read_table(parquet(tmp_path / "a.parquet", {"visits": [[1, 2]]}))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read_table(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"fedlearn\[data\]"):
        read_table(tmp_path / "a.parquet")


def test_numbers_of_parquet_and_text_of_csv_are_one_column(tmp_path):
    table = concat_tables(
        [
            read_table(parquet(tmp_path / "a.parquet", {"code": [1, 2]})),
            read_table(write(tmp_path / "b.csv", "code\n1.0\nx\n")),
        ]
    )
    assert to_categories(table.columns["code"]).tolist() == ["1", "2", "1", "x"]


ROWS = "age,y\n1,0\n2,1\n"


@pytest.mark.parametrize(
    ("files", "clients", "held_out"),
    [
        (["data.csv"], None, None),
        (["north.csv", "south.csv"], ["north", "north", "south", "south"], None),
        (["train.csv", "test.csv"], None, [True, True, False, False]),
        (
            ["north/train.csv", "north/test.csv", "south/all.csv"],
            ["north"] * 4 + ["south"] * 2,
            [True] * 2 + [False] * 4,
        ),
    ],
)
def test_who_has_what_follows_from_names(tmp_path, files, clients, held_out):
    for file in files:
        write(tmp_path / "data" / file, ROWS)
    write(tmp_path / "data" / ".hidden.csv", "other\n1\n")
    write(tmp_path / "data" / "README.txt", "about these data")
    path = tmp_path / "data" / "data.csv" if files == ["data.csv"] else tmp_path / "data"
    contents = read_contents(path)
    assert (None if contents.clients is None else contents.clients.tolist()) == clients
    assert (None if contents.test_N is None else contents.test_N.tolist()) == held_out


def test_a_column_may_say_whose_a_row_is(tmp_path):
    contents = read_contents(write(tmp_path / "a.csv", "site,y\n2,0\n1.0,1\n"), client_column="site")
    assert contents.clients.tolist() == ["2", "1"]
    with pytest.raises(DataError, match=r"scenario\.client is sight\n.*site, y\n.*scenario\.client=site"):
        read_contents(tmp_path / "a.csv", client_column="sight")
    with pytest.raises(DataError, match=r"a\.csv, row 3, column site: missing"):
        read_contents(write(tmp_path / "a.csv", "site,y\n2,0\n,1\n"), client_column="site")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["deep/er/a.csv", "wide/er/a.csv"], "too deep in the folder"),
        (["north.csv", "train.csv"], "train.csv names no client, but other files do"),
        (["notes.md"], "neither a CSV or Parquet file nor an image"),
        (["a.csv", "cat/1.png"], "both tables and images"),
    ],
)
def test_a_layout_that_says_nothing_is_refused(tmp_path, files, reason):
    for file in files:
        write(tmp_path / file, ROWS)
    with pytest.raises(DataError, match=reason):
        read_contents(tmp_path)


def test_a_path_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_contents(tmp_path / "nowhere")


def picture(path, *, size=(6, 5), mode="L", colour=7):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, colour).save(path)


@pytest.mark.parametrize(
    ("prefix", "clients", "held_out"),
    [("", None, None), ("north/", ["north"] * 2, None), ("train/", None, None), ("test/", None, [True] * 2)],
)
def test_images_lie_in_folders_by_class_and_client(tmp_path, prefix, clients, held_out):
    picture(tmp_path / f"{prefix}cat/1.png", colour=3)
    picture(tmp_path / f"{prefix}dog/1.png", colour=200)
    contents = read_contents(tmp_path)
    assert contents.images.shape == (2, 5, 6, 1)
    assert contents.images[:, 0, 0, 0].tolist() == [3, 200]
    assert contents.table.columns["class"].tolist() == ["cat", "dog"]
    assert (None if contents.clients is None else contents.clients.tolist()) == clients
    assert (None if contents.test_N is None else contents.test_N.tolist()) == held_out


def test_images_of_other_sizes_are_named_or_scaled(tmp_path):
    picture(tmp_path / "cat/1.png", mode="RGB", colour=(1, 2, 3))
    picture(tmp_path / "dog/2.png", size=(8, 8))
    with pytest.raises(DataError, match=r"2 sizes: 6 x 5 \(1, e\.g\. cat.1\.png\), 8 x 8 \(1, e\.g\. dog.2\.png\)"):
        read_contents(tmp_path)
    assert read_contents(tmp_path, images=ImageSettings(size=4)).images.shape == (2, 4, 4, 3)


def test_what_is_no_image_is_named(tmp_path):
    picture(tmp_path / "cat/1.png")
    (tmp_path / "cat/2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read as an image: cat.2\.png"):
        read_contents(tmp_path)
    (tmp_path / "cat/2.png").unlink()
    with pytest.raises(DataError, match="images have no columns"):
        read_contents(tmp_path, client_column="site")
    picture(tmp_path / "1.png")
    with pytest.raises(DataError, match="images at different depths"):
        read_contents(tmp_path)
