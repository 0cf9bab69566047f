"""What a node keeps on its own disk: its clients' memories, round by round, and how often they were trained.

``DIR/<run>/client_000003/round_000012.safetensors`` is what client 3 remembers after round 12. An order says from which
round's memory a client starts, because a round may be repeated after the coordinator was restarted, and an update that
arrived too late never happened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from fedlearn.core.arrays import as_numpy
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.records import ClientId, State
from fedlearn.errors import FedlearnError

MAX_SAVED_ROUNDS = 10  # rounds; how far back a coordinator's checkpoint may lie
REQUEST_COUNTS_FILE = "requests.json"
SECAGG_STATE_FILE = "secagg.state"
OLD_NAMES = {"orders.json": REQUEST_COUNTS_FILE, "masking.notes": SECAGG_STATE_FILE}  # of earlier versions


class ClientStateError(FedlearnError):
    """A client is to start from a memory that is not on this node's disk."""


class ClientStates:
    """The memories of this node's clients.

    Args:
        folder: made if absent, readable by the trainer's user only.

    Raises:
        ClientStateError: a file in the folder has the name that an earlier version gave it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self.folder.rglob("*"):
            if path.name in OLD_NAMES:  # it bounds what this node does; to start without would forget that
                new = path.with_name(OLD_NAMES[path.name])
                raise ClientStateError(f"{path} is called {new.name} in this version\n  try       mv {path} {new}")

    def load(self, run: str, client: ClientId, state_round: int, initial: State) -> State:
        """What a client remembers after round ``state_round``, or ``initial`` if it took part in none.

        Raises:
            MemoryLost: that memory is not there, is damaged, or belongs to another strategy.
        """
        if not initial or not state_round:
            return initial
        path = self._path(run, client, state_round)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            there = ", ".join(str(number) for number in self._rounds(run, client)) or "none"
            why = f"client {client} is to go on from its memory after round {state_round} of {run}"
            raise ClientStateError(f"{why}, which cannot be read here (there are: {there}): {error}") from error
        if {name: v.shape for name, v in found.items()} != {name: np.shape(v) for name, v in initial.items()}:
            raise ClientStateError(
                f"{path} holds {sorted(found)}, which is not what this strategy keeps: {sorted(initial)}"
            )
        return found

    def save(self, run: str, client: ClientId, round: int, state: State) -> None:
        """Keep what a client remembers after a round; forget all but the newest rounds before it, and any after it.

        Raises:
            OSError: the disk is full; what was kept before stays.
        """
        path = self._path(run, client, round)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, to_safetensors({name: np.ascontiguousarray(as_numpy(v)) for name, v in state.items()}))
        before = [number for number in self._rounds(run, client) if number < round]
        after = [number for number in self._rounds(run, client) if number > round]  # of a future that was given up
        for number in before[: -MAX_SAVED_ROUNDS + 1] + after:
            self._path(run, client, number).unlink(missing_ok=True)

    def load_secagg_state(self, run: str, client: ClientId) -> bytes:
        """What a client of secure aggregation must remember from message to message; empty at first."""
        try:
            return (self._path(run, client, 0).parent / SECAGG_STATE_FILE).read_bytes()
        except FileNotFoundError:
            return b""

    def save_secagg_state(self, run: str, client: ClientId, state: bytes) -> None:
        """Remember it, on disk before the reply leaves."""
        path = self._path(run, client, 0).parent / SECAGG_STATE_FILE
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, state)

    def request_counts(self, run: str) -> tuple[int, int]:
        """Training orders that were accepted: of this run, and of all."""
        counts = self._counts()
        return counts.get(run, 0), sum(counts.values())

    def count_request(self, run: str) -> None:
        """Note one more, on disk before anything is trained."""
        counts = self._counts()
        counts[run] = counts.get(run, 0) + 1
        write_atomically(self.folder / REQUEST_COUNTS_FILE, json.dumps(counts, indent=1) + "\n")

    def _counts(self) -> dict[str, int]:
        path = self.folder / REQUEST_COUNTS_FILE
        try:
            counts: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return {str(run): int(count) for run, count in counts.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError) as error:
            raise ClientStateError(
                f"{path} is damaged, so that it is not known how often this node has trained"
            ) from error

    def _rounds(self, run: str, client: ClientId) -> list[int]:
        names = [path.stem for path in self._path(run, client, 0).parent.glob("round_*.safetensors")]
        return sorted(int(name.removeprefix("round_")) for name in names)

    def _path(self, run: str, client: ClientId, round: int) -> Path:
        return self.folder / check_run_name(run) / f"client_{client:06d}" / f"round_{round:06d}.safetensors"


def check_run_name(run: str) -> str:
    """The name of a run, which becomes a folder's.

    Raises:
        FedlearnError: it could lead elsewhere.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", run):
        raise FedlearnError(f"the run is called {run!r}, expected up to 100 letters, digits, '-', '_' and '.'")
    return run
