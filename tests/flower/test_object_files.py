"""The store of the SuperLink keeps large parts of messages in files."""

from __future__ import annotations

import sqlite3

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import object_store_factory
from flwr.supercore.object_store.object_store import NoObjectInStoreError

from fedlearn.flower.compat.object_files import MIN_FILE_BYTES, object_store_class, store_objects_in_files
from fedlearn.flower.compat.parts import PartsArray, record_of

DATA = bytes(range(256)) * (5 * 2**20 // 256 * 2) + b"x" * MIN_FILE_BYTES  # equal parts are one object


def message(data=DATA):
    content = RecordDict({"r": record_of({"a": PartsArray([data], "s")})})
    return content, {key: part.deflate() for key, part in get_all_nested_objects(content).items()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "objects").mkdir()
    return tmp_path


def opened(folder):
    store = object_store_class()(folder / "objects", str(folder / "flower.db"))
    store.initialize()
    return store


def names(folder):
    return {path.name for path in (folder / "objects").iterdir()}


def filled(folder, data=DATA, run=1):
    store, (content, objects) = opened(folder), message(data)
    assert set(store.preregister(run, get_object_tree(content))) == objects.keys()
    for key, part in objects.items():
        assert store.get(key) == b""
        store.put(key, part)
    return store, content.object_id, objects


def test_each_part_comes_back_also_after_a_restart_and_large_ones_are_files(folder):
    _, _, objects = filled(folder)
    assert names(folder) == {each for each, part in objects.items() if len(part) >= MIN_FILE_BYTES}
    assert len(names(folder)) == 2
    store = opened(folder)
    assert {each: store.get(each) for each in objects} == objects
    with sqlite3.connect(folder / "flower.db") as database:
        ((size,),) = database.execute("select max(length(content)) from objects")
    assert size < MIN_FILE_BYTES


@pytest.mark.parametrize(
    "remove",
    [
        pytest.param("delete", marks=pytest.mark.slow),
        "delete_objects_in_run",
        pytest.param("clear", marks=pytest.mark.slow),
    ],
)
def test_the_files_of_a_removed_message_are_deleted(folder, remove):
    store, key, objects = filled(folder)
    arguments = {"delete": [key], "delete_objects_in_run": [1], "clear": []}[remove]
    getattr(store, remove)(*arguments)
    assert names(folder) == set()
    assert [store.get(each) for each in objects] == [None] * len(objects)


@pytest.mark.slow
def test_a_part_of_two_messages_stays_until_the_second_is_removed(folder):
    store, first, _ = filled(folder)
    content, objects = message(DATA + b"y")
    for each in store.preregister(1, get_object_tree(content)):
        store.put(each, objects[each])
    store.delete(first)
    assert {each: store.get(each) for each in objects} == objects
    store.delete(content.object_id)
    assert names(folder) == set()


def test_a_removal_that_is_rolled_back_keeps_the_files(folder):
    store, key, objects = filled(folder)

    def fail():
        with store.session():
            store.delete(key)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {each: store.get(each) for each in objects} == objects


@pytest.mark.slow
def test_a_file_that_a_crash_has_left_is_deleted_at_the_start(folder):
    filled(folder)
    (folder / "objects" / ("0" * 64)).write_bytes(b"left")
    before = names(folder)
    opened(folder)
    assert names(folder) == before - {"0" * 64}


@pytest.mark.slow
def test_a_lost_file_is_a_missing_part(folder):
    store, *_ = filled(folder)
    for path in (folder / "objects").iterdir():
        path.unlink()
        assert store.get(path.name) is None


@pytest.mark.slow
def test_a_part_with_another_digest_or_form_or_that_nobody_announced_is_refused(folder):
    store, _, objects = filled(folder)
    large = next(each for each, part in objects.items() if len(part) >= MIN_FILE_BYTES)
    for key, content in ((large, objects[large] + b"x"), ("0" * 64, objects[large])):
        with pytest.raises(ValueError, match="does not match"):
            store.put(key, content)
    _, others = message(b"z" * 2**17)
    new = next(each for each, part in others.items() if len(part) >= MIN_FILE_BYTES)
    with pytest.raises(NoObjectInStoreError):
        store.put(new, others[new])


def test_the_superlink_uses_this_store(folder, monkeypatch):
    monkeypatch.setattr(object_store_factory, "SqlObjectStore", object_store_factory.SqlObjectStore)
    store_objects_in_files(folder / "objects")
    store = object_store_factory.ObjectStoreFactory(str(folder / "flower.db")).store()
    assert store.folder == folder / "objects"


@pytest.mark.parametrize("place", ["../key.pem", "{folder}/key.pem", "..", ".", "", "key.pem", "A" * 64])
def test_an_id_of_a_node_names_no_other_file(folder, place):
    store = opened(folder)
    keys = [store.folder / "key.pem", folder / "key.pem"]
    for key in keys:
        key.write_text("secret")
    for id in (place.format(folder=folder), f"../{place}"):
        store.delete(id)
        assert store.get(id) is None
        with pytest.raises(ValueError, match="digest"):
            store.put(id, b"x" * MIN_FILE_BYTES)
    assert [key.read_text() for key in keys] == ["secret"] * 2
