from __future__ import annotations

import numpy as np
import pytest

from fedlearn.data.contents import Contents
from fedlearn.data.row_splits import (
    RowSplit,
    SplitSettings,
    held_out_table,
    leakage_note,
    split_contents,
    split_settings_of,
)
from fedlearn.data.schema import ColumnSchema, TableSchema
from fedlearn.data.tables import Table
from fedlearn.errors import DataError, SettingError

NAMES = ("north", "south")


def contents_of(count=40, *, test=(), validation=(), **columns):
    cells = {name: np.array(values, object) for name, values in columns.items()}
    masks = [np.isin(np.arange(count), [*rows]) if len(rows) else None for rows in (test, validation)]
    return Contents(table=Table(cells, (("a.csv", 2, count),)), clients=None, test_N=masks[0], validation_N=masks[1])


def split(contents, *, names=NAMES, test_share=0.25, seed=1, **settings):
    count = len(contents.table)
    rows = [np.arange(count // 2), np.arange(count // 2, count)]
    y_N, options = np.arange(count) % 2, {"names": names, "test_share": test_share, "seed": seed}
    return split_contents(contents, rows, y_N, SplitSettings(**settings), **options)


def parts(result):
    return [sorted(np.concatenate(rows).tolist()) for rows in (result.train, result.test)]


@pytest.mark.parametrize("spelling", [("train", "test"), ("TRAIN", "Testing"), ("training_set", "hold-out")])
def test_a_column_of_any_spelling_splits(spelling):
    folds = [spelling[row % 4 == 0] for row in range(40)]
    train, test = parts(split(contents_of(fold=folds), split_column="fold"))
    assert test == list(range(0, 40, 4))
    assert train == sorted({*range(40)} - {*test})


def test_a_wrong_value_of_a_split_column_is_named_by_its_row():
    with pytest.raises(DataError, match=r"a\.csv, row 4, column fold: not a usual name of a split"):
        split(contents_of(3, fold=["train", "test", "7"]), split_column="fold")


@pytest.mark.parametrize(
    ("use", "test", "in_train", "in_test"),
    [(None, [1], 0, 0), (None, [], 0, 2), ("train", [1], 2, 0), ("test", [1], 0, 2), ("none", [], 0, 0)],
)
def test_validation_rows_are_used_as_stated(use, test, in_train, in_test):
    result = split(contents_of(test=test, validation=[3, 30]), validation=use)
    train, held_out = parts(result)
    assert len({3, 30} & {*train}) == in_train
    assert len({3, 30} & {*held_out}) == in_test
    assert "2 validation rows" in result.notes[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_groups", [2, 7, 20])
def test_a_group_is_in_one_part_also_across_clients(seed, num_groups):
    groups = np.array([f"p{row % num_groups}" for row in range(400)], object)
    train, test = parts(split(contents_of(400, patient=groups), group_column="patient", seed=seed))
    assert not {*groups[train]} & {*groups[test]}
    assert len(train) + len(test) == 400


def test_the_part_of_a_group_does_not_depend_on_other_rows():
    groups = [f"p{row % 20}" for row in range(400)]
    both = split(contents_of(400, patient=groups), group_column="patient")
    alone = split(contents_of(200, patient=groups[:200]), group_column="patient", names=())
    assert parts(alone)[1] == [row for row in parts(both)[1] if row < 200]


def test_a_group_in_both_parts_is_refused_without_its_name():
    contents = contents_of(4, test=[1], patient=["secret", "secret", "b", "c"])
    with pytest.raises(DataError, match="1 groups of patient have training rows and held-out rows") as caught:
        split(contents, group_column="patient")
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match=r"a\.csv, row 3, column patient: missing"):
        split(contents_of(2, patient=["a", None]), group_column="patient")


def test_a_held_out_client_never_trains():
    result = split(contents_of(), held_out_clients=("south",))
    assert [len(rows) for rows in result.train] == [15, 0]
    assert [len(rows) for rows in result.test] == [5, 20]
    assert result.held_out_clients == (1,)
    assert "never trains: south (20 rows)" in result.notes


@pytest.mark.parametrize("wanted", [("soth",), ("north", "south")])
def test_wrong_held_out_clients_are_refused(wanted):
    with pytest.raises(SettingError, match="held_out_clients"):
        split(contents_of(), held_out_clients=wanted)


def test_a_client_without_training_rows_is_named_and_evaluated_only():
    result = split(contents_of(test=range(20, 40)))
    assert result.held_out_clients == (1,)
    assert result.notes == ("never trains: south (20 rows)",)


def test_a_schema_states_split_groups_and_what_is_held_out():
    columns = {"patient": ColumnSchema(type="id"), "fold": ColumnSchema(type="category")}
    nothing = {"split": None, "group": None, "validation": None, "held_out_clients": ()}
    schema = TableSchema(columns=columns, group="patient", hold_out=("p3",))
    settings = split_settings_of(schema, **nothing)
    assert settings == SplitSettings(group_column="patient", held_out_groups=("p3",))
    groups = [f"p{row % 10}" for row in range(40)]
    rows, options = [np.arange(40)], {"names": (), "test_share": 0.1, "seed": 1}
    held_out = split_contents(contents_of(patient=groups), rows, np.zeros(40), settings, **options).test[0]
    assert {3, 13, 23, 33} <= {*held_out.tolist()}
    schema = TableSchema(columns=columns, split="fold", hold_out=("south",))
    settings = split_settings_of(schema, **nothing)
    assert settings == SplitSettings(split_column="fold", held_out_clients=("south",))


def test_held_out_rows_are_listed_as_ranges():
    table = Table({}, (("a.csv", 2, 3), ("cat/1.png", 1, 1), ("b.csv", 2, 3)))
    text = held_out_table(table, [np.array([3, 0, 1]), np.array([4, 6])], NAMES)
    assert text.splitlines() == ["client,file,rows", "north,a.csv,2-3", "north,cat/1.png,", "south,b.csv,2 4"]


def test_equal_images_in_both_parts_are_counted():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] % 3
    result = RowSplit(train=[np.array([0, 1])], test=[np.array([2, 3])])
    assert leakage_note(images, result) == ("warning: 1 of 2 held-out images are also training images",)
    assert leakage_note(images[:3], RowSplit(train=[np.array([0, 1])], test=[np.array([2])])) == ()
