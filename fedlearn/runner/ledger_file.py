"""Keep the privacy ledger of a deployed run beside its checkpoints; see `fedlearn.loop.charging`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.private_files import write_private_json
from fedlearn.core.records import ServerState
from fedlearn.errors import CheckpointError

LEDGER_FILE = "ledger.json"


@dataclass(frozen=True)
class LedgerFile:
    """The newest ledger of a run, in a file of its run folder.

    Only a run whose uploads are private against the server writes the file.

    Args:
        folder: run folder.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """Return the path of the file in the folder of the checkpoints."""
        return self.folder / CHECKPOINT_FOLDER / LEDGER_FILE

    def record(self, ledger: Ledger) -> None:
        """Write the ledger. After the return, no crash can lose it.

        Raises:
            CheckpointError: The disk is full, or the folder is not writable. No request goes out without this file.
        """
        try:
            write_private_json(self.path, ledger.to_json())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error.strerror}\n  advice    free disk space, then resume the run"
            ) from error

    def restore(self, state: ServerState) -> ServerState:
        """Return a saved state with the recorded ledger, which has the cost of the rounds after the checkpoint.

        Without a file, the state has the ledger of its checkpoint.

        Raises:
            CheckpointError: The file is damaged.
        """
        try:
            return replace(state, ledger=Ledger.from_json(json.loads(self.path.read_text(encoding="utf-8"))))
        except FileNotFoundError:
            return state
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read, so the privacy loss of the run is unknown: {error}\n"
                "  advice    restore a backup, or start a new run"
            ) from error
