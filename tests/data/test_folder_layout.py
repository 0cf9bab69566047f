from __future__ import annotations

from itertools import product

import pytest

from fedlearn.data.folder import read_contents
from fedlearn.data.folder_layout import infer_layout, list_files
from fedlearn.data.split_names import split_of
from fedlearn.data.table_places import table_places
from fedlearn.errors import DataError, FedlearnError, SettingError

SPELLINGS = {
    "train": "train Train TRAIN training train_set trainset train-data Train2017 01_train training_images 训练集",
    "validation": "val Val VALID valid validation validation_set dev DEV_SET val2017 development",
    "test": "test Test TESTING testing test_set test-images eval evaluation holdout hold-out held_out TestData 测试集",
}


def layout_of(*levels, **known):
    return str(infer_layout([*product(*(level.split() for level in levels))], **known))


@pytest.mark.parametrize(("split", "names"), SPELLINGS.items())
def test_usual_spellings_of_splits_are_recognized(split, names):
    assert {split_of(name) for name in names.split()} == {split}


@pytest.mark.parametrize(
    "name", ["north", "train_station", "tested", "contest", "devon", "value", "1", "", "test north"]
)
def test_other_names_are_no_splits(name):
    assert split_of(name) is None


@pytest.mark.parametrize(
    ("levels", "known", "layout"),
    [
        (["cat dog"], {}, "class"),
        (["north south", "cat dog"], {}, "client/class"),
        (["north", "cat dog"], {}, "client/class"),
        (["TRAIN Valid test_set", "cat dog"], {}, "split/class"),
        (["test", "cat dog"], {}, "split/class"),
        (["dataset", "train test", "cat dog"], {}, "*/split/class"),
        (["chest_xray", "chest_xray", "train val test", "cat dog"], {}, "*/*/split/class"),
        (["north south", "train test", "cat dog"], {}, "client/split/class"),
        (["north", "train test", "cat dog"], {"clients": ["north", "south"]}, "client/split/class"),
        (["train test", "north south", "cat dog"], {}, "split/client/class"),
        (["cat dog", "train test"], {}, "class/split"),
        (["cat dog", "north south"], {"clients": ["north", "south"]}, "class/client"),
        (["cat dog", "north south"], {"classes": ["cat", "dog"]}, "class/client"),
        (["images", "cat dog"], {}, "*/class"),
        (["train test", "images", "cat dog"], {}, "split/*/class"),
        (["train car bus"], {}, "class"),
        (["north south", "control test"], {}, "client/class"),
        (["north south", "cat dog", "p1 p2"], {"layout": "client/class/group"}, "client/class/group"),
        (["train test", "cat dog"], {"layout": "client/class"}, "client/class"),
    ],
)
def test_a_layout_follows_from_the_names_of_folders(levels, known, layout):
    assert layout_of(*levels, **known) == layout


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (["train test north", "cat dog"], "train, test beside north, which are either splits or names of a client"),
        (["north test", "cat dog"], "test beside north"),
        (["train test"], "train, test, which are either splits or names of a class"),
        (["north south", "cat dog", "p1 p2"], "the meaning of the folders is not clear"),
        ([], "images without folders"),
    ],
)
def test_an_unclear_layout_is_refused_with_a_setting_that_decides_it(levels, reason):
    with pytest.raises(DataError, match=reason) as caught:
        layout_of(*levels)
    stated = str(caught.value).partition("scenario.layout=")[2].split(",")[0]
    assert not levels or layout_of(*levels, layout=stated) == stated


@pytest.mark.parametrize("layout", ["class", "client/klass", "client/client", "client/class/split", ""])
def test_a_stated_layout_must_fit(layout):
    with pytest.raises(SettingError, match="expected  a level client, class, split, group"):
        layout_of("north south", "cat dog", layout=layout)


def test_hidden_files_files_of_the_system_and_links(tmp_path):
    kept = tmp_path / "real" / "1.png"
    for name in (".hidden/1.png", "__MACOSX/1.png", "a/.DS_Store", "a/Thumbs.db", "a/._1.png", "a/desktop.ini"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    kept.parent.mkdir()
    kept.touch()
    (tmp_path / "data" / "b").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "around").symlink_to(tmp_path / "data")
    assert list_files(tmp_path / "data") == [tmp_path / "data" / "b" / "1.png"]


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ("north south", [("north", None), ("south", None)]),
        ("train TESTING", [("", "train"), ("", "test")]),
        ("train/north test/north", [("north", "train"), ("north", "test")]),
        ("north/Training north/dev", [("north", "train"), ("north", "validation")]),
        ("data/north/train data/south/test_set", [("north", "train"), ("south", "test")]),
        ("north_train north_test south-train", [("north", "train"), ("north", "test"), ("south", "train")]),
        ("train_north test_north", [("north", "train"), ("north", "test")]),
        ("train/train test/test", [("", "train"), ("", "test")]),
        ("evaluation", [("", None)]),
    ],
)
def test_names_of_tables_give_clients_and_splits(tmp_path, names, places):
    assert table_places(tmp_path, [tmp_path / f"{name}.csv" for name in names.split()]) == places


def test_a_stated_layout_of_tables_decides(tmp_path):
    files = [tmp_path / "north.csv", tmp_path / "test.csv"]
    assert table_places(tmp_path, files, layout="client") == [("north", None), ("test", None)]
    with pytest.raises(SettingError, match="layout='client'"):
        table_places(tmp_path, files, layout="client/split")


def test_a_table_is_no_split_alone(tmp_path):
    (tmp_path / "test.csv").write_text("age,y\n1,0\n2,1\n")
    assert read_contents(tmp_path / "test.csv").test_N is None
    assert read_contents(tmp_path).test_N is None
    (tmp_path / "north.csv").write_text("age,y\n1,0\n")
    with pytest.raises(
        FedlearnError, match=r"test\.csv names no client, but other files do\n.*scenario\.layout=client"
    ):
        read_contents(tmp_path)
