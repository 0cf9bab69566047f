"""Run a node, one site of a federation: ``python -m fedlearn.deploy.node``.

A node has two processes. The trainer has the data and enforces the policy. Flower's SuperNode carries messages and has
no access to data: it starts messengers, which connect to the trainer through a socket. To run the two as different
users, start the trainer with its own command, and this command with ``--socket`` and without ``--policy``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlearn.advice import command
from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.deploy.connectivity import ConnectionProblem, check_connection, free_port, is_final
from fedlearn.deploy.keys import CA, NODE_KEY
from fedlearn.deploy.processes import GRACE_S, Child, Children, flower_environment, module_command, private_files
from fedlearn.errors import FedlearnError

CLIENT_STATES_FOLDER, OLD_CLIENT_STATES_FOLDER = "client_states", "memory"  # folders in --state
TRAINER_TIMEOUT_S = 60.0  # seconds for the trainer to start
POLL_INTERVAL_S = 0.5  # seconds between two checks of the processes
# parts of Flower's log lines; after the first one, Flower handles each message only when the next one arrives
BACKLOG_MESSAGE = "Ignoring message"
JOINED_MESSAGE, REJECTED_MESSAGE = "SuperNode ID:", "Failed to activate SuperNode"


class NodeError(FedlearnError):
    """Report a node that cannot join the federation."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """Settings of one node.

    Args:
        coordinator: address of the coordinator, ``host:port``.
        keys: folder with the node's private key and the root certificate.
        state: folder for logs, Flower's files, the socket and the client states; it is created if it is missing.
        socket: Unix socket of the trainer.
        trainer_args: arguments for the trainer; None if the trainer is started separately.
        port: local port that Flower's processes of this node use, default 0; 0 takes a free port.
        connect_timeout_s: seconds to wait for the coordinator, default 60.
    """

    coordinator: str
    keys: Path
    state: Path
    socket: Path
    trainer_args: Sequence[str] | None
    port: int = 0
    connect_timeout_s: float = 60.0


def serve(node: Node) -> None:
    """Run a node until the process is interrupted.

    Guarantees:
        A process that ends is restarted. A process that ends too often ends the node, with the reason. No child process
        outlives the node (on Linux even after SIGKILL).

    Raises:
        FedlearnError: The trainer does not start, the coordinator is unreachable or does not admit this node.
        KeyboardInterrupt: The process received Ctrl-C or SIGTERM.
    """
    for name in (NODE_KEY, CA):
        if not (node.keys / name).is_file():
            fix = "choose the folder keys/nodes/NAME that python -m fedlearn.deploy.keys created"
            raise NodeError(f"--keys {node.keys} has no {name}\n  advice    {fix}")
    node.state.mkdir(parents=True, exist_ok=True)
    node.state.chmod(0o700)  # an earlier version may have created it for all users
    with Children() as children:
        watched = [children.start(_trainer(node, node.trainer_args))] if node.trainer_args is not None else []
        children.wait_for(lambda: is_serving(node.socket), f"the trainer at {node.socket}", timeout_s=TRAINER_TIMEOUT_S)
        _wait_for_coordinator(node)
        messenger = children.start(_supernode(node))
        is_joined = False
        while True:
            if not is_joined and JOINED_MESSAGE in messenger.read_output():
                sys.stdout.write(f"node of {node.coordinator}   logs in {node.state.resolve()}\nready\n")
                sys.stdout.flush()
                is_joined = True
            for child in watched:
                child.restart_if_ended()
            if BACKLOG_MESSAGE in messenger.read_output():
                messenger.stop()
                messenger.reap(time.monotonic() + GRACE_S)
            if messenger.exit_code is not None:
                _refuse_if_not_admitted(messenger, node)
                _wait_for_coordinator(node)
                messenger.restart_if_ended()
            time.sleep(POLL_INTERVAL_S)


def _refuse_if_not_admitted(messenger: Child, node: Node) -> None:
    if REJECTED_MESSAGE in messenger.read_output():
        fix = "keys/nodes/NAME of an admitted node: this key is revoked, or of another federation"
        raise NodeError(f"{node.coordinator} does not admit the key of this node\n  advice    {fix}")


def is_serving(socket: Path, *, timeout_s: float = 1.0) -> bool:
    """Return whether a trainer serves requests on a socket, by gRPC's standard health service."""
    with grpc.insecure_channel(f"unix:{socket.resolve()}") as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _wait_for_coordinator(node: Node) -> None:
    until = time.monotonic() + node.connect_timeout_s
    while True:
        try:
            return check_connection(node.coordinator, node.keys / CA)
        except ConnectionProblem as error:
            if time.monotonic() > until or is_final(error):
                raise
            time.sleep(1.0)


def _trainer(node: Node, options: Sequence[str]) -> Child:
    command = [*module_command("fedlearn.deploy.trainer"), "--socket", str(node.socket.resolve()), *options]
    return Child("the trainer", command, node.state / "trainer.log", parent_death_signal=signal.SIGTERM)


def _supernode(node: Node) -> Child:
    command = [
        *module_command("fedlearn.deploy.node_side.supernode"),
        *("--superlink", node.coordinator, "--root-certificates", str(node.keys / CA)),
        *("--auth-supernode-private-key", str(node.keys / NODE_KEY)),
        *("--host", "127.0.0.1", "--port", str(node.port or free_port())),
        *("--node-config", f'socket="{node.socket.resolve()}"'),
    ]
    env = flower_environment(node.state / "flower")
    return Child("the SuperNode", command, node.state / "supernode.log", env, parent_death_signal=signal.SIGTERM)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser("fedlearn.deploy.node", "Join a federation with the data of this site.")
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="address")
    parser.add_argument("--keys", type=Path, required=True, help="folder with the keys of this node")
    parser.add_argument("--state", type=Path, default=Path("node"), help="folder for logs and client states")
    parser.add_argument("--socket", type=Path, help="Unix socket of the trainer; default: STATE/trainer.sock")
    parser.add_argument("--port", type=int, default=0, help="local port for Flower; 0 takes a free port")
    parser.add_argument(
        "--connect-timeout", type=float, default=60.0, help="seconds to wait for the coordinator at the start"
    )
    trainer = parser.add_argument_group("trainer (without --policy, start the trainer separately)")
    trainer.add_argument(
        "--policy", type=Path, help="policy of this node: python -m fedlearn.deploy.node_side.policy prints an example"
    )
    trainer.add_argument(
        "--data", type=Path, help="folder with the data; default: the folders that the scenario searches"
    )
    trainer.add_argument("--client", type=int, action="append", default=[], help="id of a client of this node; repeat")
    trainer.add_argument("--framework", choices=("torch", "jax"), help="default: the framework of the request")
    trainer.add_argument("--device", help="device that trains, e.g. cuda:0")
    trainer.add_argument("--group", help="group that may open the socket too")
    return parser


def node_from_args(args: argparse.Namespace) -> Node:
    """Return the settings of a node from the command line.

    Raises:
        NodeError: ``--policy`` is present, and ``--client`` is missing.
    """
    socket = args.socket or args.state / "trainer.sock"
    return Node(
        coordinator=args.coordinator,
        keys=args.keys,
        state=args.state,
        socket=socket,
        trainer_args=_trainer_args(args) if args.policy else None,
        port=args.port,
        connect_timeout_s=args.connect_timeout,
    )


def _trainer_args(args: argparse.Namespace) -> list[str]:
    if not args.client:
        raise NodeError("--client is missing\n  expected  the id of each client of this node\n  try       --client 0")
    options = ["--policy", str(args.policy.resolve()), "--client-states", str(_client_states_folder(args.state))]
    options += ["--keys", str(args.keys.resolve())]
    options += [word for client in args.client for word in ("--client", str(client))]
    for name in ("framework", "device", "group"):
        if getattr(args, name):
            options += [f"--{name}", getattr(args, name)]
    return options + (["--data", str(args.data.resolve())] if args.data else [])


def _client_states_folder(state: Path) -> Path:
    folder, old = state / CLIENT_STATES_FOLDER, state / OLD_CLIENT_STATES_FOLDER
    if old.exists() and not folder.exists():  # the old folder may have the ledger of this node's privacy budget
        expected = f"client states of this version in {folder}"
        raise NodeError(
            f"{old} is of an earlier version\n  expected  {expected}\n  try       {command('mv', old, folder)}"
        )
    return folder.resolve()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 stopped by Ctrl-C or SIGTERM, 2 cannot join."""
    return run_command(build_parser(), _serve_until_stopped, argv)


def _serve_until_stopped(**options: Any) -> int:
    try:
        with private_files():
            serve(node_from_args(argparse.Namespace(**options)))
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
