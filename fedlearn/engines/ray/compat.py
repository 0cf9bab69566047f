"""Ray's undocumented names: the only module that uses them.

The names below only keep Ray quiet and give a folder to its sessions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedlearn.core.private_names import PrivateNames
from fedlearn.errors import IncompatibleVersion

log = logging.getLogger(__name__)

RAY = PrivateNames(
    library="ray",
    tried=("2.55.1",),
    lowest="2.40",
    extra="ray",
    names={"start": (), "worker notices": ("ray._private.worker:_worker_logs_enabled",)},
)


def verify_version() -> None:
    """Raise unless the installed version of Ray is accepted.

    Raises:
        IncompatibleVersion: it is too old.
    """
    RAY.verify("start")


def session_folder(folder: str) -> dict[str, Any]:
    """Return the arguments of ``ray.init`` that put the files of a new cluster into a folder."""
    return {"_temp_dir": folder}


@contextmanager
def without_worker_notices() -> Iterator[None]:
    """Keep Ray's notices about dead workers from the terminal; ``log_to_driver=False`` does not stop them.

    A version of Ray without this switch prints the notices; a warning in the log gives the cause.
    """
    try:
        RAY.verify("worker notices")
    except IncompatibleVersion as error:
        log.warning("%s", error)
        yield
        return
    from ray._private import worker

    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = True
