"""Store client states and counts of training requests on the disk of a node.

``DIR/<run>/client_000003/round_000012.safetensors`` is the state of client 3 after round 12. A request names the round
of the client state to start from. The latest state may be wrong: a restarted coordinator may repeat a round, or an
update may have missed its deadline.
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

from fedlearn.advice import command
from fedlearn.core.arrays import as_numpy
from fedlearn.core.private_files import write_private, write_private_json
from fedlearn.core.records import ClientId, State
from fedlearn.errors import FedlearnError

MAX_SAVED_ROUNDS = 10  # client states per client; a coordinator can resume from a checkpoint of these rounds
REQUEST_COUNTS_FILE = "requests.json"
SECAGG_STATE_FILE = "secagg.state"
OLD_NAMES = {
    "orders.json": REQUEST_COUNTS_FILE,
    "masking.notes": SECAGG_STATE_FILE,
}  # names in earlier versions -> present names


class ClientStateError(FedlearnError):
    """Report client states or other state files of a node that are missing, damaged or of another version."""


class ClientStates:
    """The stored client states of this node.

    Args:
        folder: folder for the files; it is created if it is missing. Only the trainer's user can read it.

    Raises:
        ClientStateError: A file in the folder has the name of an earlier version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self.folder.rglob("*"):
            if path.name in OLD_NAMES:  # without this file, limits of this node would start again from zero
                new = path.with_name(OLD_NAMES[path.name])
                raise ClientStateError(
                    f"{path} has the name {new.name} in this version\n  try       {command('mv', path, new)}"
                )

    def load(self, run: str, client: ClientId, state_round: int, initial: State) -> State:
        """Return the state of a client after a round.

        Args:
            run: name of the run.
            client: id of the client.
            state_round: round of the client state, >= 0; 0 returns ``initial``.
            initial: initial client state, which has the expected names and shapes.

        Raises:
            ClientStateError: The client state is missing, is damaged, or belongs to another strategy.
        """
        if not initial or not state_round:
            return initial
        path = self._path(run, client, state_round)
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            available = ", ".join(str(number) for number in self._rounds(run, client)) or "none"
            expected = f"the state of client {client} after round {state_round} of run {run}"
            raise ClientStateError(
                f"{expected} cannot be read at this node (available rounds: {available}): {error}"
            ) from error
        if {name: v.shape for name, v in state.items()} != {name: np.shape(v) for name, v in initial.items()}:
            raise ClientStateError(f"{path} has {sorted(state)}, but this strategy expects {sorted(initial)}")
        return state

    def save(self, run: str, client: ClientId, round: int, state: State) -> None:
        """Save the state of a client after a round.

        Only the states of the `MAX_SAVED_ROUNDS` newest rounds are kept. States of later rounds are deleted.

        Raises:
            OSError: The disk is full; the states that were saved earlier stay.
        """
        path = self._path(run, client, round)
        write_private(path, to_safetensors({name: np.ascontiguousarray(as_numpy(v)) for name, v in state.items()}))
        before = [number for number in self._rounds(run, client) if number < round]
        after = [number for number in self._rounds(run, client) if number > round]  # these rounds are repeated
        for number in before[: -MAX_SAVED_ROUNDS + 1] + after:
            self._path(run, client, number).unlink(missing_ok=True)

    def load_secagg_state(self, run: str, client: ClientId) -> bytes:
        """Return the state of a client of secure aggregation between two messages; empty before the first message."""
        try:
            return (self._path(run, client, 0).parent / SECAGG_STATE_FILE).read_bytes()
        except FileNotFoundError:
            return b""

    def save_secagg_state(self, run: str, client: ClientId, state: bytes) -> None:
        """Save the state of a client of secure aggregation; call this before the response leaves the node."""
        write_private(self._path(run, client, 0).parent / SECAGG_STATE_FILE, state)

    def request_counts(self, run: str) -> tuple[int, int]:
        """Return the number of accepted training requests of this run, and of all runs."""
        counts = self._counts()
        return counts.get(run, 0), sum(counts.values())

    def count_request(self, run: str) -> None:
        """Count one more training request on disk; call this before the training."""
        counts = self._counts()
        counts[run] = counts.get(run, 0) + 1
        write_private_json(self.folder / REQUEST_COUNTS_FILE, counts)

    def _counts(self) -> dict[str, int]:
        path = self.folder / REQUEST_COUNTS_FILE
        try:
            counts: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return {str(run): int(count) for run, count in counts.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError) as error:
            raise ClientStateError(
                f"{path} is damaged: the number of training requests of this node is unknown\n"
                "  advice    restore a backup of this file"
            ) from error

    def _rounds(self, run: str, client: ClientId) -> list[int]:
        names = [path.stem for path in self._path(run, client, 0).parent.glob("round_*.safetensors")]
        return sorted(int(name.removeprefix("round_")) for name in names)

    def _path(self, run: str, client: ClientId, round: int) -> Path:
        return self.folder / check_run_name(run) / f"client_{client:06d}" / f"round_{round:06d}.safetensors"


def check_run_name(run: str) -> str:
    """Return the name of a run if it is a safe name for a folder.

    Raises:
        FedlearnError: The name has characters that could lead to another folder, or is too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", run):
        raise FedlearnError(f"the name of the run is {run!r}, expected up to 100 letters, digits, '-', '_' and '.'")
    return run
