"""Run Flower's SuperLink, and require the token of a person for calls of its Control API.

Without a check of accounts, every client that reaches Flower's port can start and stop runs and admit nodes. Only
Flower's enterprise edition has such a check. This module uses the same interface to check the token, and
`fedlearn.deploy.coordinator_side.control_access` checks the role.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlearn.deploy.audit_log import AuditLog
from fedlearn.deploy.coordinator_side.control_access import ControlAccess
from fedlearn.deploy.coordinator_side.environment import LOCAL_DIGEST_ENV, NODES_ENV, PERSONS_ENV, RUNS_ENV, STATE_ENV
from fedlearn.deploy.coordinator_side.request_limits import MAX_CONNECTIONS, App, RequestLimits
from fedlearn.deploy.coordinator_side.run_api import RunApi
from fedlearn.deploy.coordinator_side.submissions import Submissions
from fedlearn.deploy.key_files import KeysError, read_public
from fedlearn.deploy.log_format import stamp_output
from fedlearn.deploy.persons import Persons
from fedlearn.deploy.processes import return_freed_memory
from fedlearn.flower.compat.object_files import store_objects_in_files
from fedlearn.flower.compat.superlink import run_superlink, signing_key

CHECK_INTERVAL_S = 1.0
OBJECTS = "objects"  # folder in the state of the coordinator: large parts of messages


class AdmittedNodes:
    """Check that a request comes from an admitted node.

    Args:
        folder: folder with the public keys of the admitted nodes.
        check_interval_s: seconds between two looks at its files. Each request of a node needs them, and they are many.
    """

    def __init__(self, folder: Path, *, check_interval_s: float = CHECK_INTERVAL_S) -> None:
        self.folder, self.check_interval_s = folder, check_interval_s
        self._keys: dict[str, bytes] = {}  # name of a file -> its key
        self._files: object = None
        self._read_at = float("-inf")  # on the monotonic clock

    def have_signed(self, headers: Mapping[str, str]) -> bool:
        """Return whether the key of an admitted node has signed the headers."""
        key = signing_key(headers)
        return key is not None and key in self._read().values()

    def _read(self) -> dict[str, bytes]:
        if time.monotonic() - self._read_at < self.check_interval_s:
            return self._keys
        self._read_at = time.monotonic()
        files = sorted((path.name, path.stat().st_mtime_ns) for path in self.folder.glob("*.pub"))
        if files != self._files:
            read = {name: self._read_key(name) for name, _ in files}
            self._files = files if all(is_read for _, is_read in read.values()) else None
            self._keys = {name: key for name, (key, _) in read.items() if key}
        return self._keys

    def _read_key(self, name: str) -> tuple[bytes, bool]:
        """Return the key in a file, and True; for a file that is being written its earlier key, and False."""
        try:
            return read_public(self.folder / name), True
        except KeysError:
            return self._keys.get(name, b""), False


def main() -> None:
    """Run the SuperLink, with the command-line arguments of ``flower-superlink``."""
    stamp_output()
    return_freed_memory()
    state = Path(os.environ[STATE_ENV])
    persons = Persons(Path(os.environ[PERSONS_ENV]), os.environ[LOCAL_DIGEST_ENV])
    nodes = AdmittedNodes(Path(os.environ[NODES_ENV]))

    def limits(app: App, **settings: Any) -> RequestLimits:
        access = ControlAccess(app, persons=persons, audit=AuditLog(state), submissions=Submissions(state))
        api = RunApi(access, persons=persons, runs=Path(os.environ[RUNS_ENV]), state=state)
        return RequestLimits(api, **settings)

    store_objects_in_files(state / OBJECTS)
    run_superlink(
        lambda token: persons.authenticate(token) is not None,
        limits,
        max_connections=MAX_CONNECTIONS,
        is_node=nodes.have_signed,
        is_person=lambda headers: persons.find(headers) is not None,
    )


if __name__ == "__main__":
    main()
