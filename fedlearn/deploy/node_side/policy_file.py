"""Read the policy of a node again when its file changes, so that a change is in force at the next request."""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import datetime
from pathlib import Path

from fedlearn.deploy.node_side.policy import Policy, read_policy
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.errors import FedlearnError

SETTLE_S = 1.0  # seconds without a change, after which a file counts as written completely
UNREADABLE = "the policy of this node cannot be read, so it refuses all requests; ask its operator"
log = logging.getLogger(__name__)


class PolicyFile:
    """The policy in a file.

    A file that is missing, damaged or half written gives no policy. The earlier policy may be wider than the one that
    the operator writes, so it never stays in force.

    Args:
        path: the file.

    Raises:
        FedlearnError: The file is not a policy.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._version = self._read_version()  # first, so that a change during the start is noticed
        self._policy: Policy | None = read_policy(path)
        self._log_change()

    def current(self) -> Policy:
        """Return the policy in the file, which is read again after a change.

        Raises:
            PolicyViolation: The file is not a policy at this moment.
        """
        with self._lock:
            version = self._read_version()
            if version != self._version or version is None:
                self._read(self._wait_until_written())
            if self._policy is None:
                raise PolicyViolation(UNREADABLE)
            return self._policy

    def read_again(self) -> None:
        """Read the file now, e.g. after SIGHUP, and log the result."""
        with self._lock:
            self._version = None
            self._read(self._wait_until_written())

    def _read(self, version: tuple[int, ...] | None) -> None:
        if version == self._version and version is not None:
            return
        was_readable = self._policy is not None
        try:
            self._policy, self._version = read_policy(self.path), version
            self._log_change()
        except (FedlearnError, TypeError, ValueError, AttributeError) as error:
            self._policy, changed = None, version != self._version
            self._version = version
            if was_readable or changed:
                log.error("all requests are refused, because the policy cannot be read: %s", error)

    def _wait_until_written(self) -> tuple[int, ...] | None:
        """Return the version of the file after it did not change for `SETTLE_S`. An editor may write it in parts."""
        while (version := self._read_version()) is not None:
            age = time.time() - version[0] / 1e9
            if not 0 <= age < SETTLE_S:
                return version
            time.sleep(SETTLE_S - age)
        return None

    def _read_version(self) -> tuple[int, ...] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns

    def _log_change(self) -> None:
        changed = datetime.fromtimestamp(self.path.stat().st_mtime)
        log.info("policy of %s in force", f"{changed:%H:%M}" if changed.date() == datetime.now().date() else changed)
