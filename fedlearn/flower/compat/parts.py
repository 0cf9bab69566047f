"""Receive and send messages of Flower in parts. Large arrays stay on disk.

Flower holds all parts of a message in memory, and then joins them with two further copies. Before it sends the first
part, it copies all parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from flwr.app import Array, ArrayRecord

from fedlearn.core.spool import Spool, TooLarge
from fedlearn.core.tensor_bytes import Buffer, join, num_bytes
from fedlearn.flower.compat.names import FLOWER

MAX_HEAD_BYTES = 64 * 2**20  # bytes of a message without the chunks of its arrays
PARTS_AT_A_TIME = 8  # parts of 5 MiB in memory
CHUNK, ARRAY, RECORD = "ArrayChunk", "Array", "ArrayRecord"  # types of objects in a message
Pull = Callable[[str], bytes]


class Contents(dict[str, bytes]):
    """The parts of a message by id, without the chunks of its arrays. They are in a spool.

    Args:
        spool: receives the chunks, in the order of their arrival.
    """

    def __init__(self, spool: Spool) -> None:
        super().__init__()
        self.spool = spool
        self.chunks: dict[str, tuple[int, int]] = {}  # id of a chunk -> start and end in the spool
        self.message: Any = None  # the message in the parts


def pull_contents(object_ids: Sequence[str], pull: Pull, *, spool: Spool, **settings: Any) -> Contents:
    """Return the parts of a message. Arguments after ``spool`` are arguments of Flower's ``pull_objects``.

    The message comes first, then the objects in it, and the chunks of each array in their order. `push_contents` sends
    them in this order, too. The SuperLink lists the chunks in the order of their ids. In this order, the first part may
    be the last one that arrives.

    Args:
        object_ids: ids of the parts; the last one is the message.
        pull: returns the content of a part.
        spool: receives the chunks.
        settings: arguments of Flower's ``pull_objects``.

    Raises:
        TooLarge: The chunks have more bytes than the spool accepts, or the other parts have more than `MAX_HEAD_BYTES`.
        ValueError: A part names a part that is not in the list.
        OSError: The disk is full.
    """
    FLOWER.verify("parts")
    from flwr.supercore.inflatable.inflatable_object import get_object_children_ids_from_object_content
    from flwr.supercore.inflatable.inflatable_utils import pull_objects

    contents, known, size = Contents(spool), set(object_ids), 0
    level, chunks = [object_ids[-1]], list[str]()
    while level:
        below = list[str]()
        for ids in _groups(level):
            for object_id, content in pull_objects(ids, pull, **settings).items():
                contents[object_id], size = content, size + len(content)
                children = get_object_children_ids_from_object_content(content)
                (chunks if _read(content)[0] == ARRAY else below).extend(children)
            if size > MAX_HEAD_BYTES:
                raise TooLarge(f"the parts of the message have more than {MAX_HEAD_BYTES} bytes without arrays")
        level = [child for child in dict.fromkeys(below) if child not in contents]
        if not known.issuperset((*level, *chunks)):
            raise ValueError("a part of the message names an unknown part")
    for ids in _groups(list(dict.fromkeys(chunks))):
        pulled = pull_objects(ids, pull, **settings)
        for object_id in ids:
            _add_chunk(contents, object_id, pulled.pop(object_id))
    return contents


def _add_chunk(contents: Contents, object_id: str, content: bytes) -> None:
    kind, body = _read(content)
    if kind != CHUNK:
        raise ValueError(f"a part of an array is a {kind:.40}")
    start = len(contents.spool)
    contents.spool.write(body)
    contents.chunks[object_id] = start, len(contents.spool)


def _read(content: bytes) -> tuple[str, memoryview]:
    """Return the type of an object, and its body."""
    from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER

    end = content.index(HEAD_BODY_DIVIDER)
    kind = content[:end].decode().split(HEAD_VALUE_DIVIDER)[0]
    return kind, memoryview(content)[end + len(HEAD_BODY_DIVIDER) :]


def inflate(object_id: str, contents: Contents) -> Any:
    """Return the object of a message with this id. The data of its arrays are views of the spool.

    Raises:
        TooLarge: An array repeats its chunks to more bytes than the spool accepts.
    """
    FLOWER.verify("parts")
    from flwr.supercore.inflatable.inflatable_object import get_object_children_ids_from_object_content
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    objects: dict[str, Any] = {}
    for key, content in reversed(contents.items()):  # arrays before their records
        kind, body = _read(content)
        if kind == ARRAY:
            fields, children = json.loads(bytes(body)), get_object_children_ids_from_object_content(content)
            chunks = [contents.chunks[children[number]] for number in fields["arraychunk_ids"]]
            objects[key] = array = Array(fields["dtype"], tuple(fields["shape"]), fields["stype"], b"")
            array.data = cast(bytes, _joined(contents.spool, chunks))
        elif kind == RECORD:
            objects[key] = record_of({name: objects[part] for name, part in json.loads(bytes(body)).items()})
    return inflate_object_from_contents(object_id, contents, objects=objects)


def record_of(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Return a record of arrays; the constructor of Flower would copy them."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def _joined(spool: Spool, chunks: Sequence[tuple[int, int]]) -> Buffer:
    """Return the bytes of chunks one after another; without a copy if they are in this order in the spool."""
    if not chunks:
        return b""
    starts, ends = zip(*chunks, strict=True)
    if starts[1:] == ends[:-1]:
        return spool.view(starts[0], ends[-1])
    joined, whole = Spool(spool.folder, max_bytes=spool.max_bytes), spool.view()
    for start, end in chunks:
        joined.write(whole[start:end])
    return joined.view()


def push_contents(
    objects: Mapping[str, Any],
    push_object_fn: Callable[[str, bytes], None],
    *,
    object_ids_to_push: Collection[str] | None = None,
) -> None:
    """Send objects of a message, a few at a time.

    Args:
        objects: objects by id.
        push_object_fn: sends the content of one object.
        object_ids_to_push: ids of the objects that the server needs; None: all objects.
    """
    FLOWER.verify("parts")
    from flwr.app.message.arraychunk import ArrayChunk
    from flwr.supercore.inflatable.inflatable_utils import push_object_contents_from_iterable

    needed = [key for key in objects if object_ids_to_push is None or key in object_ids_to_push]
    needed.sort(key=lambda key: isinstance(objects[key], ArrayChunk))  # in the order of `pull_contents`
    for keys in _groups(needed):
        push_object_contents_from_iterable(((key, objects[key].deflate()) for key in keys), push_object_fn)


def _groups(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), PARTS_AT_A_TIME):
        yield list(keys[start : start + PARTS_AT_A_TIME])


class PartsArray(Array):
    """Bytes in several parts as an array of a message, without a copy.

    Args:
        parts: the bytes; they must not change until the message is sent.
        stype: name of the format.
    """

    __qualname__ = ARRAY  # Flower sends it as the type

    def __init__(self, parts: Sequence[Buffer], stype: str) -> None:
        self.__dict__["parts"] = list(parts)
        super().__init__("uint8", (num_bytes(parts),), stype, b"")

    @property
    def data(self) -> bytes:
        """A copy of the bytes."""
        return b"".join(parts_of(self))

    @data.setter
    def data(self, value: bytes) -> None:
        """Do nothing: `parts` has the bytes."""

    def slice_array(self) -> list[tuple[str, Any]]:
        """Return the chunks of the bytes, with their ids."""
        from flwr.app.message.arraychunk import ArrayChunk

        if "chunks" not in self.__dict__:
            chunks = [ArrayChunk(piece) for piece in _pieces(parts_of(self))]
            self.__dict__["chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
        return list(self.__dict__["chunks"])


def parts_of(array: Array) -> list[Buffer]:
    """Return the data of an array in parts, without a copy."""
    return list(vars(array).get("parts", ())) or [array.data]


def _pieces(parts: Sequence[Buffer]) -> Iterator[memoryview]:
    """Yield the bytes in pieces with the size of a chunk; only pieces across the end of a part are copies."""
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    size, piece = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, list[memoryview]()
    for part in parts:
        left = memoryview(part)
        while left:
            taken = left[: size - num_bytes(piece)]
            piece, left = [*piece, taken], left[len(taken) :]
            if num_bytes(piece) == size:
                yield memoryview(join(piece))
                piece = []
    if piece:
        yield memoryview(join(piece))
