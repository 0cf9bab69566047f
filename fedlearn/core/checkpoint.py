"""What a run needs to go on: one safetensors file a round, written atomically, with its facts as JSON in the header.

Shapes: K clients with a memory, D parameters laid flat.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import ClientId, InFlight, Request, ServerState, State
from fedlearn.errors import CheckpointError

VERSION = 6  # before 6, states of aggregation rules were among the states of stages
LEDGER = "ledger"
DAMAGES = (SafetensorError, OSError, KeyError, ValueError)  # what reading a broken file raises


def save(
    folder: Path,
    state: ServerState,
    client_states: Mapping[ClientId, State],
    *,
    layout: Layout,
    keep: int = 2,
    keep_rounds: Collection[int] = (),
) -> Path:
    """Write ``folder/round_000012.safetensors``; delete all but the newest ``keep`` and those of ``keep_rounds``.

    Guarantees: at every moment the folder holds a whole checkpoint (once it has held one); `load` gives back
    bit-identical arrays.

    Raises:
        OSError: if the disk is full or the folder cannot be written; older checkpoints then stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(state, client_states)
    facts = {
        "version": VERSION,
        "round": state.round,
        "seed": state.seed,
        "layout": layout.digest,
    }
    facts |= {"num_stages": len(state.stages), "sha256": _digest(tensors)}
    path = checkpoint_path(folder, state.round)
    write_atomically(path, to_safetensors(tensors, metadata={"fedlearn": json.dumps(facts)}))
    kept = {checkpoint_path(folder, round) for round in keep_rounds}
    for old in _newest_first(folder)[keep:]:
        if old not in kept:
            old.unlink()
    return path


def checkpoint_path(folder: Path, round: int) -> Path:
    """Return the file of a round."""
    return folder / f"round_{round:06d}.safetensors"


def saved_rounds(folder: Path) -> list[int]:
    """Return the rounds that have a checkpoint, in ascending order."""
    return sorted(int(path.stem.removeprefix("round_")) for path in _newest_first(folder))


def load(path: Path, layout: Layout) -> tuple[ServerState, dict[ClientId, State]]:
    """The state and the clients' memories.

    Raises:
        CheckpointError: if the file is damaged, of another format, or belongs to a model with another layout.
    """
    facts, tensors = _read(path)
    if facts["layout"] != layout.digest:
        raise CheckpointError(f"{path} belongs to a model with other parameters\n  try       the run's own config.yaml")
    stages = tuple(_group(tensors, f"stage/{i}/") for i in range(facts["num_stages"]))
    state = ServerState(
        round=facts["round"],
        seed=facts["seed"],
        params_D=tensors["params"],
        server=_group(tensors, "server/"),
        stages=stages,
        aggregate=_group(tensors, "aggregate/"),
        select=_group(tensors, "select/"),
        ledger=_ledger(tensors),
        clock=float(tensors["clock"][0]) if "clock" in tensors else 0.0,
        in_flight=_in_flight(tensors, facts["seed"]),
    )
    memory_KD = _group(tensors, "client/")
    clients = tensors.get("clients", np.zeros(0, np.int64)).tolist()
    return state, {client: {name: v[k] for name, v in memory_KD.items()} for k, client in enumerate(clients)}


def load_latest(folder: Path, layout: Layout) -> tuple[ServerState, dict[ClientId, State], list[str]]:
    """The newest whole checkpoint of a folder, and a line for each damaged one that was passed over.

    Raises:
        CheckpointError: if there is none, or they are of another format.
    """
    check_format(folder)
    passed_over: list[str] = []
    for path in _newest_first(folder):
        try:
            return *load(path, layout), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    found = "\n  ".join(passed_over) or "the folder holds none"
    raise CheckpointError(f"no usable checkpoint in {folder}\n  {found}\n  try       start the run again")


def check_format(folder: Path) -> None:
    """Refuse a folder with a checkpoint that another version of fedlearn wrote; `load_latest` tells of damaged ones.

    Raises:
        CheckpointError: there is one of another format.
    """
    for path in _newest_first(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                facts = _facts(file)
        except DAMAGES:
            continue
        _require_format(path, facts)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file in one step, on disk before this returns: a crash leaves the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _tensors(state: ServerState, memories: Mapping[ClientId, State]) -> dict[str, np.ndarray]:
    tensors: dict[str, Any] = {"params": state.params_D}
    tensors |= {f"server/{name}": v for name, v in state.server.items()}
    tensors |= {f"stage/{i}/{name}": v for i, memory in enumerate(state.stages) for name, v in memory.items()}
    tensors |= {f"aggregate/{name}": v for name, v in state.aggregate.items()}
    tensors |= {f"select/{name}": v for name, v in state.select.items()}
    if memories:
        clients = sorted(memories)
        tensors["clients"] = np.array(clients, np.int64)
        names = memories[clients[0]]
        tensors |= {f"client/{name}": np.stack([memories[client][name] for client in clients]) for name in names}
    if state.ledger != Ledger():
        tensors[LEDGER] = np.frombuffer(json.dumps(state.ledger.to_json()).encode(), np.uint8)
    if state.clock or state.in_flight:
        tensors |= {"clock": np.array([state.clock], np.float64), **_in_flight_tensors(state.in_flight)}
    return {name: np.ascontiguousarray(as_numpy(v)) for name, v in tensors.items()}


def _in_flight_tensors(in_flight: Sequence[InFlight]) -> dict[str, Any]:
    """Requests under way: who has which, and each model that was sent once."""
    tensors: dict[str, Any] = {
        "in_flight/client": np.array([one.client for one in in_flight], np.int64),
        "in_flight/round": np.array([one.request.round for one in in_flight], np.int64),
        "in_flight/clock": np.array([one.request.clock for one in in_flight], np.float64),
    }
    for number, order in {one.request.round: one.request for one in in_flight}.items():
        tensors[f"sent/{number}/params"] = order.params_D
        tensors |= {f"sent/{number}/broadcast/{name}": vector for name, vector in order.broadcast.items()}
    return tensors


def _in_flight(tensors: Mapping[str, np.ndarray], seed: int) -> tuple[InFlight, ...]:
    columns = _group(tensors, "in_flight/")
    if not columns:
        return ()
    orders = {}
    for number in set(columns["round"].tolist()):
        sent = _group(tensors, f"sent/{number}/")
        broadcast = _group(sent, "broadcast/")
        orders[number] = Request(round=number, seed=seed, params_D=sent["params"], broadcast=broadcast)
    rows = zip(*(columns[name].tolist() for name in ("client", "round", "clock")), strict=True)
    return tuple(
        InFlight(client=client, request=replace(orders[number], clock=clock)) for client, number, clock in rows
    )


def _ledger(tensors: Mapping[str, np.ndarray]) -> Ledger:
    return Ledger.from_json(json.loads(tensors[LEDGER].tobytes())) if LEDGER in tensors else Ledger()


def _group(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            facts = _facts(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except DAMAGES as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    _require_format(path, facts)
    if facts["sha256"] != _digest(tensors):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return facts, tensors


def _facts(file: Any) -> dict[str, Any]:
    return dict(json.loads((file.metadata() or {})["fedlearn"]))


def _require_format(path: Path, facts: Mapping[str, Any]) -> None:
    if facts["version"] != VERSION:
        fix = "resume with the version of fedlearn that wrote it, or start a new run"
        raise CheckpointError(
            f"this version of fedlearn cannot read {path}\n"
            f"  expected  a checkpoint of format {VERSION}, not {facts['version']}\n  try       {fix}"
        )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("round_*.safetensors"), reverse=True)
