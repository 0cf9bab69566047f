"""Store the last responses of each run, so that a repeated request gets an equal response.

Without the store, a node would train again and send fresh noise. The mean of several responses has less noise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlearn.core.private_files import write_private
from fedlearn.core.serialization import WireError, map_file, pack_bytes, read_fields, require_array
from fedlearn.core.tensor_bytes import Buffer
from fedlearn.deploy.node_side.client_states import check_run_name
from fedlearn.deploy.node_side.pending_charges import PENDING

MAX_STORED_RUNS = 10  # newest runs whose responses stay on disk
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredResponses:
    """The last response of each run and kind, in files that only the trainer's user can read.

    Args:
        folder: folder of the client states.
    """

    folder: Path

    def load(self, run: str, kind: str, digest: str) -> memoryview | None:
        """Return the stored response to an equal request; None if there is none.

        Args:
            run: name of the run.
            kind: kind of the request.
            digest: digest of the request.
        """
        path = self._path(run, kind)
        if not path.exists():
            return None
        try:
            stored = map_file(path)
            is_equal = read_fields(stored.metadata, digest=str)["digest"] == digest
            response = stored.arrays["response"]
            require_array(response, (response.size,), np.uint8, "response")
            return response.data if is_equal else None
        except (WireError, KeyError) as error:
            log.warning("the stored response %s cannot be read: %s", path, error)
            return None

    def save(self, run: str, kind: str, digest: str, response: Sequence[Buffer]) -> None:
        """Store a response in parts before it leaves, in place of the last response of the same run and kind.

        Raises:
            OSError: The disk is full.
        """
        path = self._path(run, kind)
        write_private(path, pack_bytes({"digest": digest}, "response", response))
        folders = {old.parent for old in self.folder.glob("*/response_*")} - {path.parent}
        for folder in sorted(folders, key=lambda each: each.stat().st_mtime)[: -MAX_STORED_RUNS + 1]:
            # a paid request could be answered for free a second time, if only its response were deleted
            for old in [*folder.glob("response_*"), *folder.glob(PENDING)]:
                old.unlink(missing_ok=True)

    def _path(self, run: str, kind: str) -> Path:
        return self.folder / check_run_name(run) / f"response_{kind}.safetensors"
