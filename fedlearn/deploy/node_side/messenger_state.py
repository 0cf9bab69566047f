"""Keep the state of a messenger in a file, for its parent process and for the messenger after a restart."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.core.private_files import write_private_json

STATE_FILE, NODE_ID_FILE = "messenger.json", "node_id.json"
NOT_ADMITTED = 4  # exit code of a messenger: the coordinator does not admit the key of this node
MAX_AGE_S = 12.0  # seconds after which a state counts as old: the messenger hangs, or is stopped


@dataclass
class MessengerState:
    """The state of a messenger.

    Args:
        folder: folder for the files.
        node_id: Flower's id of the node; 0 before the first connection.

    Attributes:
        problems: ``coordinator`` and ``trainer`` -> problem; empty if it works.
    """

    folder: Path
    node_id: int = 0
    problems: dict[str, str] = field(default_factory=lambda: {"coordinator": "not connected yet", "trainer": ""})
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @classmethod
    def load(cls, folder: Path) -> MessengerState:
        """Return the state with the id of the last connection, if there was one."""
        node_id: Any = 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            node_id = json.loads((folder / NODE_ID_FILE).read_text(encoding="utf-8"))["node_id"]
        return cls(folder, node_id if type(node_id) is int and node_id > 0 else 0)

    def save_node_id(self) -> None:
        """Save the id of the connection. The next messenger ends this connection before it connects."""
        with suppress(OSError):  # without the file, the coordinator needs some seconds to notice the end
            write_private_json(self.folder / NODE_ID_FILE, {"node_id": self.node_id})

    def report(self, **problems: str) -> None:
        """Record the problem of a connection, and write the file. An empty text means that it works."""
        with self._lock, suppress(OSError):
            self.problems |= problems
            content = {"time": time.time(), "node_id": self.node_id, **self.problems}
            path = self.folder / STATE_FILE
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(content), encoding="utf-8")
            draft.replace(path)


def read_problem(folder: Path, part: str) -> str:
    """Return the problem of a part of the path from the coordinator to the trainer; empty if it works.

    Args:
        folder: folder of the messenger's state.
        part: ``messenger``, ``coordinator`` or ``trainer``.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        age_s = time.time() - content["time"]
        if part != "messenger":
            return str(content[part]) if age_s < MAX_AGE_S else ""
        return "" if age_s < MAX_AGE_S else f"it has not answered for {age_s:.0f} s"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not started yet"
