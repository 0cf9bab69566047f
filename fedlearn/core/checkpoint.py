"""Save and load the state of a run: safetensors files, written atomically, with a digest inside.

``round_000012.safetensors`` has the state of the server after round 12. ``clients_000012.safetensors`` has the client
states that changed since the last checkpoint. The file of a round names the file of each other client.

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
from types import MappingProxyType
from typing import Any

import numpy as np

from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import ClientId, InFlight, Request, ServerState, State
from fedlearn.core.serialization import (
    Payload,
    WireError,
    read_fields,
    read_file,
    read_file_metadata,
    select_prefix,
    with_prefix,
    write_file,
)
from fedlearn.core.tensor_bytes import Buffer
from fedlearn.errors import CheckpointError

__all__ = ["check_format", "checkpoint_path", "load", "load_latest", "save", "saved_rounds"]

VERSION = 7  # before 7, one file had the states of all clients
NOTHING: Mapping[ClientId, int] = MappingProxyType({})
LEDGER = "ledger"


def save(
    folder: Path,
    state: ServerState,
    client_states: Mapping[ClientId, State],
    *,
    layout: Layout,
    keep: int = 2,
    keep_rounds: Collection[int] = (),
    unchanged: Mapping[ClientId, int] = NOTHING,
) -> Path:
    """Write a checkpoint such as ``folder/round_000012.safetensors``, and delete older ones.

    Args:
        folder: folder of the checkpoints; created if it is missing.
        state: server state after the round.
        client_states: state of each client that has one.
        layout: layout of the model vector.
        keep: number of newest checkpoints that stay, >= 1.
        keep_rounds: rounds whose checkpoints stay too.
        unchanged: client -> round of the file in this folder that has its state; default none. The states of all other
            clients are written.

    Returns:
        Path of the new file.

    Guarantees:
        After the first call, the folder always contains a complete checkpoint. `load` returns the same bits.

    Raises:
        OSError: The disk is full, or the folder is not writable. Older checkpoints then stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {client: unchanged.get(client, state.round) for client in sorted(client_states)}
    changed = {client: client_states[client] for client, round in files.items() if round == state.round}
    if changed:
        _write(clients_path(folder, state.round), {}, _client_arrays(changed))
    metadata = {
        "round": state.round,
        "seed": state.seed,
        "layout": layout.digest,
        "num_stages": len(state.stages),
        "client_files": sorted(set(files.values())),
    }
    path = checkpoint_path(folder, state.round)
    _write(path, metadata, _arrays(state, files))
    _delete_old(folder, keep, keep_rounds)
    return path


def checkpoint_path(folder: Path, round: int) -> Path:
    """Return the path of the checkpoint of a round."""
    return folder / f"round_{round:06d}.safetensors"


def clients_path(folder: Path, round: int) -> Path:
    """Return the path of the client states that changed before the checkpoint of a round."""
    return folder / f"clients_{round:06d}.safetensors"


def saved_rounds(folder: Path) -> list[int]:
    """Return the rounds that have a checkpoint, in ascending order."""
    return sorted(int(path.stem.removeprefix("round_")) for path in _newest_first(folder))


def load(path: Path, layout: Layout) -> tuple[ServerState, dict[ClientId, State]]:
    """Return the server state and the client states.

    Raises:
        CheckpointError: The file is damaged, has another format, or belongs to a model with another layout.
    """
    metadata, arrays = _read_round(path)
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
    return state, _load_client_states(path.parent, arrays)


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


def write_atomically(path: Path, content: bytes | str | Sequence[Buffer]) -> None:
    """Replace the content of a file in one step; see `atomic_draft`. The content may be in parts."""
    with atomic_draft(path) as draft, draft.open("wb") as file:
        for part in [content] if isinstance(content, bytes | str) else content:
            file.write(part.encode() if isinstance(part, str) else part)


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


def _client_arrays(client_states: Mapping[ClientId, State]) -> dict[str, np.ndarray]:
    names = next(iter(client_states.values()))
    rows = {f"client/{name}": np.stack([as_numpy(each[name]) for each in client_states.values()]) for name in names}
    return {"clients": np.array(list(client_states), np.int64), **rows}


def _load_client_states(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[ClientId, State]:
    """Return the states of all clients of a checkpoint, from the files that it names."""
    if "clients" not in arrays:
        return {}
    clients, files = arrays["clients"].tolist(), arrays["client_files"].tolist()
    found: dict[tuple[ClientId, int], State] = {}
    for round in set(files):
        _, stored = _read(clients_path(folder, round))
        rows_KD = select_prefix(stored, "client/")
        for k, client in enumerate(stored["clients"].tolist()):
            found[client, round] = {name: rows[k] for name, rows in rows_KD.items()}
    try:
        return {client: found[client, round] for client, round in zip(clients, files, strict=True)}
    except KeyError as missing:
        client, round = missing.args[0]
        raise CheckpointError(f"{clients_path(folder, round)} has no state of client {client}") from missing


def _delete_old(folder: Path, keep: int, keep_rounds: Collection[int]) -> None:
    """Delete older checkpoints, and files of client states that no checkpoint names any more."""
    newest = _newest_first(folder)
    kept = {*newest[:keep], *(checkpoint_path(folder, round) for round in keep_rounds)}
    for old in newest:
        if old not in kept:
            old.unlink()
    used = {clients_path(folder, round) for path in _newest_first(folder) for round in _client_files(path)}
    for path in folder.glob("clients_*.safetensors"):
        if path not in used:
            path.unlink()


def _client_files(path: Path) -> list[int]:
    try:
        return [int(round) for round in read_file_metadata(path).get("client_files", [])]
    except (WireError, TypeError, ValueError):
        return []  # a damaged checkpoint, which `load_latest` skips


def _write(path: Path, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    complete = {"version": VERSION, **metadata, "sha256": _digest(arrays)}
    with atomic_draft(path) as draft:
        write_file(draft, Payload(metadata=complete, arrays=arrays))


def _arrays(state: ServerState, files: Mapping[ClientId, int]) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = {"params": state.params_D}
    groups = {"server/": state.server, "aggregate/": state.aggregate, "select/": state.select}
    for prefix, group in groups.items():
        arrays |= with_prefix(prefix, group)
    for i, stage_state in enumerate(state.stages):
        arrays |= with_prefix(f"stage/{i}/", stage_state)
    if files:
        arrays["clients"] = np.array(list(files), np.int64)
        arrays["client_files"] = np.array(list(files.values()), np.int64)
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
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    try:
        payload = read_file(path)
        _require_format(path, payload.metadata.get("version"))
        digest = read_fields(payload.metadata, sha256=str)["sha256"]
    except WireError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if digest != _digest(payload.arrays):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return dict(payload.metadata), payload.arrays


def _read_round(path: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    metadata, arrays = _read(path)
    try:
        return read_fields(metadata, round=int, seed=int, layout=str, num_stages=int), arrays
    except WireError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _require_format(path: Path, version: Any) -> None:
    if version != VERSION:
        fix = "resume with the version of fedlearn that wrote it, or start a new run"
        raise CheckpointError(
            f"this version of fedlearn cannot read {path}\n"
            f"  expected  a checkpoint of format {VERSION}, not {version}\n  advice    {fix}"
        )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("round_*.safetensors"), reverse=True)
