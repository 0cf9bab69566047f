"""Store the last responses of each run, so that a repeated request gets an equal response.

Without the store, a node would train again and send fresh noise. The mean of several responses has less noise.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedlearn.core.private_files import write_private
from fedlearn.core.serialization import Payload, WireError, pack, read_fields, read_file
from fedlearn.deploy.node_side.client_states import check_run_name
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind

MAX_STORED_RUNS = 10  # newest runs whose responses stay on disk
STORED_KINDS = (RequestKind.FIT, RequestKind.MASK, RequestKind.EVALUATE)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredResponses:
    """The last response of each run and kind, in files that only the trainer's user can read.

    Args:
        folder: folder of the client states.
        salt: digest of the parts of the policy that determine a response. After a change of these parts, no stored
            response leaves.
    """

    folder: Path
    salt: str

    def load(self, request: NodeRequest) -> NodeResponse | None:
        """Return the stored response to an equal request, with the id of this request; None if there is none."""
        path = self._path(request)
        if request.kind not in STORED_KINDS or not path.exists():
            return None
        try:
            stored = read_file(path)
            fields = read_fields(stored.metadata, digest=str, id=str)
            if fields["digest"] != self.digest(request):
                return None
            data = stored.arrays["response"].tobytes()
            response = NodeResponse.unpack(data, replace(request, id=fields["id"]), max_bytes=len(data))
        except (WireError, KeyError) as error:
            log.warning("the stored response %s cannot be read: %s", path, error)
            return None
        return replace(response, id=request.id)

    def save(self, request: NodeRequest, response: NodeResponse) -> None:
        """Store a response before it leaves, in place of the last response of the same run and kind.

        A response without results is not stored, because a repeated request may succeed.

        Raises:
            OSError: The disk is full.
        """
        if request.kind not in STORED_KINDS or response.refusal or not response.clients:
            return
        content = Payload(
            metadata={"digest": self.digest(request), "id": request.id},
            arrays={"response": np.frombuffer(response.pack(), np.uint8)},
        )
        path = self._path(request)
        write_private(path, pack(content))
        folders = {old.parent for old in self.folder.glob("*/response_*") if not old.name.startswith(".")}
        newest = sorted(folders - {path.parent}, key=lambda each: each.stat().st_mtime, reverse=True)
        for folder in newest[MAX_STORED_RUNS - 1 :]:
            for old in folder.glob("response_*"):
                old.unlink(missing_ok=True)

    def digest(self, request: NodeRequest) -> str:
        """Return a digest of the salt and of all fields of a request but its id."""
        data = replace(request, id="").pack()
        return hashlib.sha256(self.salt.encode() + data).hexdigest()

    def _path(self, request: NodeRequest) -> Path:
        personal = "_personal" if request.kind == RequestKind.EVALUATE and request.state_rounds is not None else ""
        return self.folder / check_run_name(request.run) / f"response_{request.kind}{personal}.safetensors"
