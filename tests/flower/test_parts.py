"""Messages of Flower in parts: large arrays stay on disk, and few parts are in memory."""

from __future__ import annotations

import json
import threading
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from fedlearn.core.spool import Spool, TooLarge
from fedlearn.flower.compat import parts
from fedlearn.flower.compat.parts import PARTS_AT_A_TIME, PartsArray, inflate, parts_of, pull_contents, push_contents
from fedlearn.flower.compat.parts import record_of as to_record
from fedlearn.flower.compat.transfers import receive_on_disk

SIZE = 5 * 2**20  # bytes of a part of Flower
DATA = np.random.default_rng(1).bytes(3 * SIZE + 5)


def contents_of(*arrays):
    """Return the id of a message with these arrays, and its objects by id."""
    content = RecordDict({"r": to_record({str(number): array for number, array in enumerate(arrays)})})
    return content.object_id, {key: part.deflate() for key, part in get_all_nested_objects(content).items()}


def received(key, objects, order=None, **limits):
    spool = Spool(max_memory_bytes=2 * SIZE, **limits)
    record = inflate(key, pull_contents(order or [*objects], objects.__getitem__, spool=spool))["r"]
    return [b"".join(parts_of(array)) for array in record.values()]


@pytest.mark.parametrize("cuts", [[], [7], [SIZE], [SIZE - 1, SIZE + 1], [3, 4, 5, 2 * SIZE + 2], [0, len(DATA)]])
def test_bytes_in_any_parts_are_the_message_of_flower(cuts):
    edges = [0, *cuts, len(DATA)]
    pieces = [DATA[start:end] for start, end in pairwise(edges)]
    ours = contents_of(PartsArray(pieces, "s"))
    assert ours == contents_of(Array("uint8", (len(DATA),), "s", DATA))
    assert received(*ours) == [DATA]


@pytest.mark.parametrize("data", [DATA, bytes(4 * SIZE), DATA[:SIZE] + DATA, b"", b"x"], ids=range(5))
def test_arrays_arrive_in_any_order_of_their_parts(data):
    key, objects = contents_of(PartsArray([data], "s"), Array("uint8", (5,), "s", DATA[:5]))
    assert received(key, objects) == [data, DATA[:5]]
    by_id = [*sorted(each for each in objects if each != key), key]  # as the SuperLink
    assert received(key, objects, by_id) == [data, DATA[:5]]


def test_parts_are_pushed_in_the_order_in_which_they_are_pulled():
    content = RecordDict({"r": to_record({"a": PartsArray([DATA], "s")})})
    key, objects, pushed, pulled = content.object_id, get_all_nested_objects(content), [], []
    push_contents(objects, lambda each, part: pushed.append(each))
    contents = {each: part.deflate() for each, part in objects.items()}
    pull_contents(
        [*sorted(objects.keys() - {key}), key], lambda each: pulled.append(each) or contents[each], spool=Spool()
    )
    late = [pulled.index(each) - pushed.index(each) for each in pushed]
    assert max(map(abs, late)) <= PARTS_AT_A_TIME


def test_a_part_that_is_not_announced_is_not_pulled():
    key, objects = contents_of(PartsArray([DATA], "s"))
    with pytest.raises(ValueError, match="unknown part"):
        received(key, objects, [*objects][1:])


def test_many_parts_without_arrays_are_refused(monkeypatch):
    monkeypatch.setattr(parts, "MAX_HEAD_BYTES", 2**16)
    content = RecordDict({str(number): ConfigRecord({"x": bytes(2**14) + bytes([number])}) for number in range(9)})
    objects = {each: part.deflate() for each, part in get_all_nested_objects(content).items()}
    with pytest.raises(TooLarge):
        received(content.object_id, objects)


def hostile(**changes):
    """Return the parts of a message whose array has other fields."""
    key, objects = contents_of(Array("uint8", (SIZE,), "s", DATA[:SIZE]))
    (array,) = (each for each in objects if objects[each].startswith(b"Array "))
    head, _, body = objects[array].partition(b"\0")
    objects[array] = head + b"\0" + json.dumps({**json.loads(body), **changes}).encode()
    return key, objects


def test_an_array_that_repeats_a_part_many_times_is_refused():
    with pytest.raises(TooLarge):
        received(*hostile(arraychunk_ids=[0] * 10**5), max_bytes=4 * SIZE)


def test_a_message_with_too_many_bytes_is_refused_on_the_way():
    pulled, (_, objects) = [], contents_of(PartsArray([np.random.default_rng(2).bytes(11 * SIZE)], "s"))
    with pytest.raises(TooLarge):
        pull_contents([*objects], lambda each: pulled.append(each) or objects[each], spool=Spool(max_bytes=3 * SIZE))
    assert len(pulled) <= PARTS_AT_A_TIME + 3  # the message, its record and its array


@pytest.mark.parametrize("ids", [[1], [-2], ["0"], None, [0.0], {"a": 1}], ids=str)
def test_an_array_with_other_parts_is_an_error(ids):
    with pytest.raises((IndexError, TypeError, KeyError, ValueError)):
        received(*hostile(arraychunk_ids=ids))


@pytest.mark.parametrize(
    "content", [b"", b"ArrayChunk", b"ArrayRecord  2\0[]", b'ArrayRecord  9\0{"a":"b"}', b"\xff\0"]
)
def test_a_malformed_part_is_an_error(content):
    key = get_object_id(content)
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        received(key, {key: content})


def test_few_parts_are_in_memory_while_a_message_is_sent(monkeypatch):
    key, objects = contents_of(PartsArray([np.random.default_rng(2).bytes(11 * SIZE)], "s"))
    lock, alive, most = threading.Lock(), [0], [0]

    class Part:
        def __init__(self, name):
            self.name = name

        def deflate(self):
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])
            return objects[self.name]

    sent = {}

    def push(name, content):
        with lock:
            alive[0] -= 1
            sent[name] = content

    push_contents({name: Part(name) for name in objects}, push, object_ids_to_push=set(objects) - {key})
    assert sent.keys() == objects.keys() - {key}
    assert most[0] <= PARTS_AT_A_TIME


def test_a_record_of_flower_is_read_as_before():
    key, objects = contents_of(Array(np.arange(3.0)))
    spool = Spool()
    found = inflate(key, pull_contents([*objects], objects.__getitem__, spool=spool))["r"]
    assert isinstance(found, ArrayRecord)
    np.testing.assert_array_equal(found["0"].numpy(), [0.0, 1.0, 2.0])


@pytest.fixture
def grid(monkeypatch):
    """Return the functions with which Flower's grid receives responses, as a run of a deployment has them."""
    from flwr.superlink.grid import http_grid

    for name in ("pull_objects", "push_objects", "inflate_object_from_contents"):
        monkeypatch.setattr(http_grid, name, getattr(http_grid, name))
    receive_on_disk(0.4, folder=None, max_bytes=4 * SIZE)
    return http_grid


@pytest.mark.parametrize("ids", [[1], [-2], ["0"], None, [0.0], {"a": 1}, [0] * 10**5], ids=lambda ids: str(ids)[:9])
def test_a_malformed_response_is_an_error_of_its_node_and_does_not_end_the_run(grid, ids):
    _, objects = hostile(arraychunk_ids=ids)
    with pytest.raises(ObjectPullError):
        grid.pull_objects(object_ids=[*objects], pull_object_fn=objects.__getitem__)


@pytest.mark.parametrize(
    "content", [b"", b"ArrayChunk", b"ArrayRecord  2\0[]", b'ArrayRecord  9\0{"a":"b"}', b"\xff\0"]
)
def test_a_response_that_is_no_message_is_an_error_of_its_node(grid, content):
    key = get_object_id(content)
    with pytest.raises(ObjectPullError):
        grid.pull_objects(object_ids=[key], pull_object_fn={key: content}.__getitem__)
