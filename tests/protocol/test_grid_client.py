"""Requests and responses in Flower's records."""

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from fedlearn.protocol.grid_client import MAX_INLINE_BYTES, from_record_dict, to_record_dict, to_record_dicts


@pytest.fixture
def identity_of_flower(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.parametrize("size", [0, 5, MAX_INLINE_BYTES, MAX_INLINE_BYTES + 1, 12 * 2**20])
def test_a_message_of_any_size_arrives_as_it_was_sent(size):
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert from_record_dict(to_record_dict(payload)) == payload


def test_a_large_message_travels_in_parts_so_that_it_need_not_fit_one_protobuf(identity_of_flower):
    payload = bytes(12 * 2**20 - 7) + b"the end"
    message = Message(to_record_dict(payload), 1, "query")
    parts = [len(part.deflate()) for part in get_all_nested_objects(message).values()]
    assert max(parts) < 6 * 2**20


@pytest.mark.parametrize("content", [{}, {"fedlearn": ConfigRecord({"other": "text"})}, {"arrays": ArrayRecord()}])
def test_records_without_a_message_are_refused(content):
    with pytest.raises(ValueError, match="expected a message of fedlearn"):
        from_record_dict(RecordDict(content))


@pytest.mark.parametrize("size", [0, 9, MAX_INLINE_BYTES, MAX_INLINE_BYTES + 1])
def test_the_shared_part_follows_each_message(size):
    body = bytes(size)
    assert [
        from_record_dict(content) for content in to_record_dicts([[b"one"], [b"t", b"wo"]], [body[:5], body[5:]])
    ] == [
        b"one" + body,
        b"two" + body,
    ]


def test_flower_stores_one_copy_of_a_large_shared_part_for_any_number_of_nodes(identity_of_flower):
    messages = [
        Message(content, 1, "query")
        for content in to_record_dicts([[b"one"], [b"two"], [b"three"]], [bytes(10 * MAX_INLINE_BYTES)])
    ]
    objects = {}
    for message in messages:
        objects |= get_all_nested_objects(message)
    assert sum(len(part.deflate()) for part in objects.values()) < 11 * MAX_INLINE_BYTES
