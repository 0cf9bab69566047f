"""Use undocumented names of Ray. No other module uses them.

These names stop notices of Ray and set the folder of its sessions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from typing import Any

from fedlearn.core.import_path import ROOT, WORKING_FOLDER_ENV, is_working_folder_last, search_working_folder_last
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
    """Raise an error if the installed version of Ray is too old.

    Raises:
        IncompatibleVersion: Ray is older than the lowest accepted version.
    """
    RAY.verify("start")


def session_folder(folder: str) -> dict[str, Any]:
    """Return the arguments of ``ray.init`` that put the files of a new cluster into a folder."""
    return {"_temp_dir": folder}


@contextmanager
def import_path_of_workers() -> Iterator[dict[str, Any]]:
    """Yield arguments of ``ray.init`` that give workers the import path of this process.

    If this process searches the working folder last, its workers do too. Ray makes workers import from the current
    folder first, so fedlearn's own folder is the current folder during the start.
    """
    if not is_working_folder_last():
        yield {}
        return
    hook = f"{search_working_folder_last.__module__}.{search_working_folder_last.__name__}"
    environment = {"worker_process_setup_hook": hook, "env_vars": {WORKING_FOLDER_ENV: os.getcwd()}}
    with chdir(ROOT):
        yield {"runtime_env": environment}


@contextmanager
def without_worker_notices() -> Iterator[None]:
    """Keep Ray's notices about dead workers from the terminal; ``log_to_driver=False`` does not stop them.

    A version of Ray without this switch prints the notices, and a warning is logged.
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
