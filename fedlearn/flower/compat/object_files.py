"""Keep the large parts of messages in files, beside the database of Flower's SuperLink.

Flower writes parts of 5 MiB into SQLite. A connection to the database then caches 64 MiB of them, and there are up to
15 connections. The removal of a large message locks the database for seconds, and other requests fail.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from fedlearn.flower.compat.names import FLOWER

MIN_FILE_BYTES = 2**16  # a smaller part stays in the database
OBJECT_ID = re.compile(r"[0-9a-f]{64}")  # SHA-256 of a part
NO_FILE = "none"  # name of a file that never exists
IN_FILE = b"in a file"  # content of such a part in the database; no part of a message has this form


def store_objects_in_files(folder: Path) -> None:
    """Make the SuperLink of this process keep large parts of messages in files.

    Args:
        folder: folder for the files; it is created if it is missing. Files of unknown parts are deleted at the start.
    """
    FLOWER.verify("objects")
    from flwr.supercore.object_store import object_store_factory

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    factory: Any = object_store_factory
    factory.SqlObjectStore = partial(object_store_class(), folder)


def object_store_class() -> Any:
    """Return the class of the store; its first argument is the folder, the others are arguments of Flower's store."""
    FLOWER.verify("objects")
    from flwr.supercore.inflatable.inflatable_object import get_object_id
    from flwr.supercore.inflatable.inflatable_utils import validate_object_content
    from flwr.supercore.object_store.sql_object_store import SqlObjectStore
    from sqlalchemy import event

    class FileObjectStore(SqlObjectStore):
        def __init__(self, folder: Path, database_path: str) -> None:
            super().__init__(database_path, verify=False)  # `put` verifies
            self.folder = folder

        def initialize(self, *args: Any, **settings: Any) -> Any:
            tables = super().initialize(*args, **settings)
            for path in self.folder.iterdir():  # a crash may leave a file without an entry in the database
                if path.name not in self:
                    path.unlink()
            return tables

        def path(self, object_id: str) -> Path:
            """Return the file of a part. A node may send any text as an id, such as the path of another file."""
            return self.folder / (object_id if OBJECT_ID.fullmatch(object_id) else NO_FILE)

        def put(self, object_id: str, object_content: bytes) -> None:
            if object_id != get_object_id(object_content):
                raise ValueError(f"the id {object_id} does not match the digest of the content")
            validate_object_content(content=object_content)
            if len(object_content) < MIN_FILE_BYTES:
                return super().put(object_id, object_content)
            _write(self.path(object_id), object_content)
            super().put(object_id, IN_FILE)

        def get(self, object_id: str) -> bytes | None:
            content = super().get(object_id)
            if content != IN_FILE:
                return content
            try:
                return self.path(object_id).read_bytes()
            except FileNotFoundError:
                return None

        def delete(self, object_id: str) -> None:
            path = self.path(object_id)
            with self.session() as session:
                super().delete(object_id)
                if path.exists() and object_id not in self:
                    event.listen(session, "after_commit", lambda _: path.unlink(missing_ok=True), once=True)

        def clear(self) -> None:
            super().clear()
            for path in self.folder.iterdir():
                path.unlink()

    return FileObjectStore


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step; it is on disk at the return."""
    draft = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
