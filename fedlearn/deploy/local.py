"""``python -m fedlearn.deploy.local``: a whole federation on this machine, for the time of one run.

Temporary keys, a coordinator, nodes and a submission, all as they would be on machines of their own, with TLS and node
authentication over the loopback interface; nothing is left behind but the run folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fedlearn.deploy.children import GRACE, Child, Children, program
from fedlearn.deploy.follow import Follower
from fedlearn.deploy.keys import create
from fedlearn.deploy.submit import experiment
from fedlearn.deploy.tls import free_port
from fedlearn.errors import require
from simulations.exits import exit_code
from simulations.interrupt import terminate_as_interrupt

START_SECONDS = 90.0
OVER = "a rehearsal cannot be gone on with: its nodes are gone"
SHORT_WAITS = {"engine.join_timeout": 60, "engine.deadline": 120}  # seconds; everything is near


class Rehearsal:
    """A coordinator and nodes in a folder of their own.

    Args:
        folder: for keys, logs and state; its path must be short enough for Unix sockets.
        runs: where runs leave their folders.
        clients: for each node the clients that live there.
        policy: what the nodes accept, as settings.
        data: where all nodes find their data; None lets the scenario search.

    Attributes:
        children: the processes, by name.
        address: of the coordinator, ``host:port``.
    """

    def __init__(
        self,
        folder: Path,
        runs: Path,
        clients: Sequence[Sequence[int]],
        policy: Mapping[str, Any],
        data: str | None = None,
    ) -> None:
        self.folder, self.runs, self.clients = folder.resolve(), runs.resolve(), clients
        self.keys, self.data = self.folder / "keys", data
        self.policy = self.folder / "policy.yaml"
        self.policy.write_text(json.dumps(policy), encoding="utf-8")  # which is YAML too
        self.children: dict[str, Child] = {}
        self.address = f"localhost:{free_port()}"

    def start(self, children: Children) -> None:
        """Make keys and start all processes; returns when the coordinator and every trainer are ready.

        Raises:
            ChildError: one ended, or was not ready within a minute and a half.
        """
        names = [f"node{number}" for number in range(len(self.clients))]
        create(self.keys, ["localhost", "127.0.0.1"], names, days=2)
        self._add(children, self._coordinator())
        for name, clients in zip(names, self.clients, strict=True):
            self._add(children, self._node(name, clients))
        for child in self.children.values():
            children.wait_for(partial(_ready, child), f"{child.name} is ready", seconds=START_SECONDS)

    def tend(self) -> None:
        """Start again whatever has ended, as an init system would.

        Raises:
            ChildError: something ends again and again.
        """
        for child in self.children.values():
            if child.ended is not None:
                sys.stderr.write(f"{child.name} ended with code {child.ended}; starting it again\n")
                child.restart()

    def follower(self, *, patience: float = 60.0) -> Follower:
        """Who submits runs here and looks on."""
        return Follower(self.address, self.keys / "operator", patience, meanwhile=self.tend, resume=OVER)

    def _add(self, children: Children, child: Child) -> None:
        self.children[child.name] = children.start(child)

    def _coordinator(self) -> Child:
        state, port = self.folder / "coordinator", self.address.rpartition(":")[2]
        command = [
            *program("fedlearn.deploy.coordinator"),
            *("--keys", str(self.keys / "coordinator"), "--state", str(state)),
            *("--runs", str(self.runs), "--port", port),
        ]
        return Child("coordinator", command, self.folder / "coordinator.log", on_orphaned=signal.SIGTERM)

    def _node(self, name: str, clients: Sequence[int]) -> Child:
        command = [
            *program("fedlearn.deploy.node"),
            *("--coordinator", self.address, "--keys", str(self.keys / "nodes" / name)),
            *("--state", str(self.folder / name), "--policy", str(self.policy)),
            *(word for client in clients for word in ("--client", str(client))),
            *(("--data", self.data) if self.data else ()),
        ]
        return Child(name, command, self.folder / f"{name}.log", on_orphaned=signal.SIGTERM)


def _ready(child: Child) -> bool:
    return "\nready\n" in child.said()


def dealt(num_clients: int, nodes: int) -> list[list[int]]:
    """Clients dealt out to nodes in turn.

    >>> dealt(4, 3)
    [[0, 3], [1], [2]]
    """
    return [list(range(node, num_clients, nodes)) for node in range(nodes)]


def accepting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A policy that accepts what these settings ask for, and nothing else."""
    return {
        "scenarios": {settings["scenario"]["_target_"]: {}},
        "strategies": {settings["strategy"]["_target_"]: {}},
        "max_rounds": 1_000_000,
        "allow_targets": list(settings.get("allow_targets") or []),
    }


def rehearse(words: Sequence[str], *, keep: Path | None = None) -> int:
    """One run on a federation of this machine's own; the exit code of the run.

    Args:
        words: of a simulation, and ``nodes=4``.
        keep: a folder for keys and logs; a temporary one where it is None.

    Raises:
        FedlearnError: a word means nothing, or a process cannot be started.
    """
    nodes, words = _nodes(words)
    given = {word.partition("=")[0] for word in words}
    order = experiment([*words, *(f"{key}={value}" for key, value in SHORT_WAITS.items() if key not in given)])
    num_clients = order["settings"]["scenario"].get("num_clients") or nodes
    require(nodes <= num_clients, "nodes", nodes, f"at most {num_clients}, one client each", f"nodes={num_clients}")
    again = shlex.join(["python", "-m", "fedlearn.deploy.local", f"nodes={nodes}", *words])
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedlearn-")))
        folder.mkdir(parents=True, exist_ok=True)
        policy, path = accepting(order["settings"]), order["settings"]["scenario"].get("path")
        rehearsal = Rehearsal(folder, Path("outputs"), dealt(num_clients, nodes), policy, path)
        rehearsal.start(stack.enter_context(Children(grace=2 * GRACE)))
        return rehearsal.follower().run({**order, "again": again})


def _nodes(words: Sequence[str]) -> tuple[int, list[str]]:
    values = [word.removeprefix("nodes=") for word in words if word.startswith("nodes=")] or ["2"]
    ok = values[-1].isdigit() and int(values[-1]) >= 1
    require(ok, "nodes", values[-1], "a whole number >= 1", "nodes=4")
    return int(values[-1]), [word for word in words if not word.startswith("nodes=")]


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as those of a simulation."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlearn.deploy.local",
        description="Rehearses a deployment on this machine: keys, coordinator, nodes, run; and cleans up.",
        usage="%(prog)s [--keep DIR] [nodes=4] [word ...]   (words: see python -m simulations.run --help)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep keys, logs and state there")
    args, rest = parser.parse_known_args(words)
    terminate_as_interrupt()
    return exit_code(lambda: rehearse(rest, keep=args.keep))


if __name__ == "__main__":
    sys.exit(main())
