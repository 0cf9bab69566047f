"""Data sets in the formats of the Hugging Face Hub, in local folders."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from needs import needs

from fedlearn.data.hugging_face import from_datasets, parse_hub_path, read_hub
from fedlearn.errors import DataError, MissingExtra, SettingError

needs("datasets", "flwr_datasets", reason="flwr-datasets is not installed")


def saved(folder, features, splits):
    import datasets

    folder.mkdir()
    for name, columns in splits.items():
        built = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        built.to_parquet(str(folder / f"{name}.parquet"))
    return f"hf://{folder}"


def test_a_table_has_its_splits_and_classes_by_name(tmp_path, own_cache):
    import datasets

    features = {
        "site": datasets.Value("string"),
        "age": datasets.Value("int32"),
        "visits": datasets.List(datasets.Value("int32")),
        "label": datasets.ClassLabel(names=["no", "yes"]),
    }
    train = {"site": ["a", "b", "a"], "age": [1, None, 3], "visits": [[1], [], [2]], "label": [0, 1, -1]}
    test = {name: cells[:1] for name, cells in train.items()}
    path = saved(tmp_path / "set", features, {"train": train, "test": test})
    contents = read_hub(path, client_column="site", ignored_columns=["visits"])
    np.testing.assert_array_equal(contents.table.columns["age"], [1, np.nan, 3, 1])
    assert contents.table.columns["label"].tolist() == ["no", "yes", None, "no"]
    assert contents.clients.tolist() == ["a", "b", "a", "a"]
    assert contents.test_N.tolist() == [False, False, False, True]
    assert contents.table.row_location(3) == f"{path} (test), row 1"
    assert (own_cache / "huggingface").is_dir()
    with pytest.raises(DataError, match=r"column visits holds list(.|\n)*scenario\.ignore=\[visits\]"):
        read_hub(path)


def test_images_are_read_with_their_classes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    import datasets

    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    pictures = [image.new("L", (4, 3), colour) for colour in (1, 2)]
    contents = read_hub(saved(tmp_path / "set", features, {"train": {"image": pictures, "label": [1, 0]}}))
    assert contents.images.shape == (2, 3, 4, 1)
    assert contents.images[:, 0, 0, 0].tolist() == [1, 2]
    assert contents.table.columns["class"].tolist() == ["dog", "cat"]
    assert contents.test_N is None


def test_what_cannot_be_had_is_said(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"hf:///nowhere cannot be read: .*\n  advice    an internet connection"):
        read_hub("hf:///nowhere")
    with pytest.raises(DataError, match="expected  hf://owner/name"):
        parse_hub_path("hf://a/b/c/d")
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(MissingExtra, match=r"fedlearn\[data\]"):
        read_hub("hf://owner/name")


def table_of(**more):
    import datasets

    columns = {"site": ["b", "a", "b", "a"], "age": [1, 2, 3, 4], "dose": [[1.0, 2.0]] * 4, "label": [0, 1, 1, 0]}
    return datasets.Dataset.from_dict({**columns, **more})


def test_a_data_set_becomes_the_data_of_clients_by_a_column_or_an_assignment():
    data = from_datasets(table_of(), target="label", client_column="site", task="binary", test_share=0)
    assert [data.name(client) for client in data.clients] == ["a", "b"]
    assert data.train(0).x.tolist() == [[2, 1, 2], [4, 1, 2]]
    assert data.train(1).y.tolist() == [0, 1]
    chosen = {"features": ["age"], "assignment": np.array([1, 1, 0, 0])}
    data = from_datasets(table_of(), target="label", task="binary", test_share=0, **chosen)
    assert data.train(0).x.tolist() == [[3], [4]]


def test_a_split_named_test_is_held_out():
    data = from_datasets({"train": table_of(), "test": table_of()}, target="label", client_column="site", task="binary")
    assert [len(data.train(client)) for client in data.clients] == [2, 2]
    assert [len(data.test(client)) for client in data.clients] == [2, 2]


def test_images_of_a_data_set_become_pixels():
    image = pytest.importorskip("PIL.Image")
    import datasets

    columns = {"image": [image.new("L", (4, 3), colour) for colour in (1, 2)], "label": [1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    built = datasets.Dataset.from_dict(columns, features=features)
    data = from_datasets(built, target="label", assignment=np.array([0, 1]), task="binary", test_share=0)
    assert data.train(1).x.shape == (1, 3, 4, 1)
    assert data.train(1).x.max() == 2


def test_columns_that_cannot_be_inputs_are_refused_by_name():
    with pytest.raises(DataError, match=r"column site holds no numbers(.|\n)*without site"):
        from_datasets(table_of(), target="label", assignment=np.zeros(4, int))
    with pytest.raises(DataError, match=r"no column years(.|\n)*age"):
        from_datasets(table_of(), target="years", client_column="site")
    with pytest.raises(SettingError, match="exactly one"):
        from_datasets(table_of(), target="label")
