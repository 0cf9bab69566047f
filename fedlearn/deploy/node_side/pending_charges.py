"""Remember the request that a node has paid for and not answered, so that a crash does not charge it twice.

A request is charged before its work. A trainer that is killed during the work gets the same request again.
Nothing has left the node, so the second attempt costs nothing. An attempt that ends in any other way is paid for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlearn.core.private_files import write_private_json
from fedlearn.deploy.node_side.client_states import check_run_name

PENDING = "pending_*.json"  # files in the folder of a run, one per kind of request


@dataclass(frozen=True)
class PendingCharges:
    """The charged request of each run and kind whose work has not ended.

    Args:
        folder: folder of the client states.
    """

    folder: Path

    def includes(self, run: str, kind: str, digest: str) -> bool:
        """Return whether the node has paid for this request, and was killed before its work ended.

        Args:
            run: name of the run.
            kind: kind of the request.
            digest: digest of the request.
        """
        try:
            return bool(json.loads(self._path(run, kind).read_text(encoding="utf-8"))["digest"] == digest)
        except (OSError, ValueError, KeyError, TypeError):  # a damaged file: the node pays again, which is safe
            return False

    @contextmanager
    def charged(self, run: str, kind: str, digest: str) -> Iterator[None]:
        """Remember a charged request during the block. Only the end of this process leaves the file behind."""
        write_private_json(self._path(run, kind), {"digest": digest})
        try:
            yield
        finally:
            self._path(run, kind).unlink(missing_ok=True)

    def _path(self, run: str, kind: str) -> Path:
        return self.folder / check_run_name(run) / PENDING.replace("*", kind)
