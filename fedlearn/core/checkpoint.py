"""Save and load the state of a run: one safetensors file per round, written atomically, with a digest inside.

Shapes: K clients with a client state, D parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import ClientId, InFlight, Request, ServerState, State
from fedlearn.core.serialization import (
    Payload,
    WireError,
    pack,
    read_fields,
    read_file,
    read_file_metadata,
    select_prefix,
    with_prefix,
)
from fedlearn.errors import CheckpointError

__all__ = ["check_format", "checkpoint_path", "load", "load_latest", "save", "saved_rounds"]

VERSION = 6  # before 6, the states of stages included the states of aggregation rules
LEDGER = "ledger"


def save(
    folder: Path,
    state: ServerState,
    client_states: Mapping[ClientId, State],
    *,
    layout: Layout,
    keep: int = 2,
    keep_rounds: Collection[int] = (),
) -> Path:
    """Write a checkpoint such as ``folder/round_000012.safetensors``, and delete older ones.

    Args:
        folder: folder of the checkpoints; created if it is missing.
        state: server state after the round.
        client_states: state of each client that has one.
        layout: layout of the model vector.
        keep: number of newest checkpoints that stay, >= 1.
        keep_rounds: rounds whose checkpoints stay too.

    Returns:
        Path of the new file.

    Guarantees:
        After the first call, the folder always contains a complete checkpoint. `load` returns the same bits.

    Raises:
        OSError: The disk is full, or the folder is not writable. Older checkpoints then stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = _arrays(state, client_states)
    metadata = {
        "version": VERSION,
        "round": state.round,
        "seed": state.seed,
        "layout": layout.digest,
        "num_stages": len(state.stages),
        "sha256": _digest(arrays),
    }
    path = checkpoint_path(folder, state.round)
    write_atomically(path, pack(Payload(metadata=metadata, arrays=arrays)))
    kept = {checkpoint_path(folder, round) for round in keep_rounds}
    for old in _newest_first(folder)[keep:]:
        if old not in kept:
            old.unlink()
    return path


def checkpoint_path(folder: Path, round: int) -> Path:
    """Return the path of the checkpoint of a round."""
    return folder / f"round_{round:06d}.safetensors"


def saved_rounds(folder: Path) -> list[int]:
    """Return the rounds that have a checkpoint, in ascending order."""
    return sorted(int(path.stem.removeprefix("round_")) for path in _newest_first(folder))


def load(path: Path, layout: Layout) -> tuple[ServerState, dict[ClientId, State]]:
    """Return the server state and the client states.

    Raises:
        CheckpointError: The file is damaged, has another format, or belongs to a model with another layout.
    """
    metadata, arrays = _read(path)
    if metadata["layout"] != layout.digest:
        raise CheckpointError(
            f"{path} belongs to a model with other parameters\n  advice    the config.yaml of the same run"
        )
    state = ServerState(
        round=metadata["round"],
        seed=metadata["seed"],
        params_D=arrays["params"],
        server=select_prefix(arrays, "server/"),
        stages=tuple(select_prefix(arrays, f"stage/{i}/") for i in range(metadata["num_stages"])),
        aggregate=select_prefix(arrays, "aggregate/"),
        select=select_prefix(arrays, "select/"),
        ledger=_ledger(arrays),
        clock=float(arrays["clock"][0]) if "clock" in arrays else 0.0,
        in_flight=_in_flight(arrays, metadata["seed"]),
    )
    rows_KD = select_prefix(arrays, "client/")
    clients = arrays.get("clients", np.zeros(0, np.int64)).tolist()
    return state, {client: {name: v[k] for name, v in rows_KD.items()} for k, client in enumerate(clients)}


def load_latest(folder: Path, layout: Layout) -> tuple[ServerState, dict[ClientId, State], list[str]]:
    """Return the newest complete checkpoint of a folder, and a line for each damaged file that was skipped.

    Raises:
        CheckpointError: The folder has no usable checkpoint, or its checkpoints have another format.
    """
    check_format(folder)
    skipped: list[str] = []
    for path in _newest_first(folder):
        try:
            return *load(path, layout), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    reasons = "\n  ".join(skipped) or "the folder has no checkpoint"
    raise CheckpointError(f"no usable checkpoint in {folder}\n  {reasons}\n  advice    start the run again")


def check_format(folder: Path) -> None:
    """Raise an error if a checkpoint of the folder has another format. Only file headers are read.

    A damaged file passes here, because `load_latest` skips it.

    Raises:
        CheckpointError: A checkpoint has another format.
    """
    for path in _newest_first(folder):
        try:
            metadata = read_file_metadata(path)
        except WireError:
            continue
        if "version" in metadata:
            _require_format(path, metadata["version"])


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the content of a file in one step; see `atomic_draft`."""
    with atomic_draft(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_draft(path: Path) -> Iterator[Path]:
    """Yield the path of a draft file. The draft replaces ``path`` at the end; an error deletes it.

    *Guarantees*: the draft is on disk before it replaces the file, so a crash leaves the old file or the new one.
    """
    draft = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix, which some writers check
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _arrays(state: ServerState, client_states: Mapping[ClientId, State]) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = {"params": state.params_D}
    groups = {"server/": state.server, "aggregate/": state.aggregate, "select/": state.select}
    for prefix, group in groups.items():
        arrays |= with_prefix(prefix, group)
    for i, stage_state in enumerate(state.stages):
        arrays |= with_prefix(f"stage/{i}/", stage_state)
    if client_states:
        clients = sorted(client_states)
        arrays["clients"] = np.array(clients, np.int64)
        names = client_states[clients[0]]
        arrays |= {f"client/{name}": np.stack([client_states[client][name] for client in clients]) for name in names}
    if state.ledger != Ledger():
        arrays[LEDGER] = np.frombuffer(json.dumps(state.ledger.to_json()).encode(), np.uint8)
    if state.clock or state.in_flight:
        arrays |= {"clock": np.array([state.clock], np.float64), **_in_flight_arrays(state.in_flight)}
    return {name: np.ascontiguousarray(as_numpy(array)) for name, array in arrays.items()}


def _in_flight_arrays(in_flight: Sequence[InFlight]) -> dict[str, Any]:
    """Return client, round and clock of each in-flight request, and each sent model once."""
    arrays: dict[str, Any] = {
        "in_flight/client": np.array([flight.client for flight in in_flight], np.int64),
        "in_flight/round": np.array([flight.request.round for flight in in_flight], np.int64),
        "in_flight/clock": np.array([flight.request.clock for flight in in_flight], np.float64),
    }
    for round, request in {flight.request.round: flight.request for flight in in_flight}.items():
        arrays[f"sent/{round}/params"] = request.params_D
        arrays |= with_prefix(f"sent/{round}/broadcast/", request.broadcast)
    return arrays


def _in_flight(arrays: Mapping[str, np.ndarray], seed: int) -> tuple[InFlight, ...]:
    columns = select_prefix(arrays, "in_flight/")
    if not columns:
        return ()
    requests = {}
    for round in set(columns["round"].tolist()):
        sent = select_prefix(arrays, f"sent/{round}/")
        broadcast = select_prefix(sent, "broadcast/")
        requests[round] = Request(round=round, seed=seed, params_D=sent["params"], broadcast=broadcast)
    rows = zip(*(columns[name].tolist() for name in ("client", "round", "clock")), strict=True)
    return tuple(
        InFlight(client=client, request=replace(requests[round], clock=clock)) for client, round, clock in rows
    )


def _ledger(arrays: Mapping[str, np.ndarray]) -> Ledger:
    return Ledger.from_json(json.loads(arrays[LEDGER].tobytes())) if LEDGER in arrays else Ledger()


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    try:
        payload = read_file(path)
        _require_format(path, payload.metadata.get("version"))
        fields = read_fields(payload.metadata, round=int, seed=int, layout=str, num_stages=int, sha256=str)
    except WireError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if fields["sha256"] != _digest(payload.arrays):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return fields, payload.arrays


def _require_format(path: Path, version: Any) -> None:
    if version != VERSION:
        fix = "resume with the version of fedlearn that wrote it, or start a new run"
        raise CheckpointError(
            f"this version of fedlearn cannot read {path}\n"
            f"  expected  a checkpoint of format {VERSION}, not {version}\n  advice    {fix}"
        )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("round_*.safetensors"), reverse=True)
