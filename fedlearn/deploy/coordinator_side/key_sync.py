"""Admit and remove nodes when the key files of the coordinator change."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Protocol

from fedlearn.core.plain_text import plain_text
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.coordinator_side.admission import write_nodes
from fedlearn.deploy.coordinator_side.control_api import NodeState
from fedlearn.deploy.key_files import ALLOWED, KeysError, read_admitted

RETRY_INTERVAL_S = 5.0  # seconds until the next attempt after a problem


class NodeRegistry(Protocol):
    """The part of a `CoordinatorClient` that registers nodes."""

    def nodes(self) -> dict[bytes, int]:
        """Return the admitted nodes: public key (PEM) -> node id."""
        ...

    def node_states(self) -> list[NodeState]:
        """Return the states of the admitted nodes."""
        ...

    def register_node(self, name: str, public_key: bytes) -> None:
        """Admit a node with its public key (PEM)."""
        ...

    def unregister_node(self, node_id: int) -> None:
        """Remove a node from the admitted nodes."""
        ...


class KeySync:
    """Keep the admitted nodes equal to the key files in ``keys/allowed``.

    Args:
        control: connection to the coordinator.
        keys: folder with the coordinator's keys.
        state: state folder of the coordinator, for the names of the admitted nodes.
    """

    def __init__(self, control: NodeRegistry, keys: Path, state: Path) -> None:
        self.control, self.keys, self.state = control, keys, state
        self._synced_files: object = None
        self._problem, self._retry_at = "", 0.0

    def forget(self) -> None:
        """Compare again at the next check, for example after a restart of the SuperLink."""
        self._synced_files = None

    def check(self) -> None:
        """Admit and remove nodes if a key file has changed. Print a problem once, and try again after a while."""
        files = sorted((path.name, path.stat().st_mtime_ns) for path in (self.keys / ALLOWED).glob("*.pub"))
        if files == self._synced_files or time.monotonic() < self._retry_at:
            return
        try:
            self.sync()
        except (ConnectionProblem, KeysError) as error:
            self._retry_at = time.monotonic() + RETRY_INTERVAL_S
            if str(error) != self._problem:
                sys.stderr.write(f"the admitted nodes are not up to date: {plain_text(str(error))}\n")
                sys.stderr.flush()
            self._problem = str(error)
            return
        self._synced_files, self._problem = files, ""

    def sync(self) -> None:
        """Admit the nodes whose public keys are in ``keys/allowed``, and remove all other nodes.

        The names and keys of the admitted nodes are written to the state folder, for `Admission` and the sites of runs.

        Raises:
            KeysError: A file in this folder is not a public key.
            ConnectionProblem: The SuperLink is not reachable, or refuses a node.
        """
        wanted, known = read_admitted(self.keys / ALLOWED), self.control.nodes()
        names = {node.id: node.name for node in self.control.node_states()}
        for key in known.keys() - wanted.keys():
            self.control.unregister_node(known[key])
            _print(f"node {names.get(known[key], 'without a name')} is no longer admitted")
        problems = []
        for key in sorted(wanted.keys() - known.keys(), key=wanted.__getitem__):
            try:
                self.control.register_node(wanted[key], key)
                _print(f"node {wanted[key]} is admitted")
            except ConnectionProblem as error:
                problems.append(f"node {wanted[key]} is not admitted: {error}")
        admitted = self.control.nodes()
        write_nodes(self.state, {admitted[key]: (name, key) for key, name in wanted.items() if key in admitted})
        if problems:
            raise ConnectionProblem("\n".join(problems))


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
