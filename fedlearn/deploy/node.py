"""``python -m fedlearn.deploy.node``: one site of a federation.

Two processes: the trainer, which has the data and obeys the policy, and Flower's SuperNode, which carries messages. The
SuperNode never sees data: it starts messengers, which reach the trainer by a socket. To run it as another user than the
trainer, start the two apart: the trainer by its own command, this one with ``--socket`` and without ``--policy``.
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

from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.deploy.connectivity import ConnectionProblem, check_connection, free_port, is_final
from fedlearn.deploy.keys import CA, NODE_KEY
from fedlearn.deploy.processes import GRACE_S, Child, Children, flower_environment, module_command
from fedlearn.errors import FedlearnError

CLIENT_STATES_FOLDER, OLD_CLIENT_STATES_FOLDER = "client_states", "memory"  # in a node's --state
TRAINER_TIMEOUT_S = 60.0  # to become ready
POLL_INTERVAL_S = 0.5
BACKLOG_MESSAGE = "Ignoring message"  # Flower's words; it then answers each message only when the next one comes
JOINED_MESSAGE, REJECTED_MESSAGE = "SuperNode ID:", "Failed to activate SuperNode"  # in Flower's words


class NodeError(FedlearnError):
    """A node cannot take part."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What belongs to one node.

    Args:
        coordinator: ``host:port``.
        keys: its private key and the root certificate.
        state: logs, Flower's files, the socket and what clients remember; made if absent.
        socket: where the trainer answers.
        trainer_args: arguments for the trainer; None where it is somebody else's to run.
        port: on which Flower's processes of this node meet, local to this machine; 0 takes a free one.
        connect_timeout_s: seconds to wait for the coordinator before giving up.
    """

    coordinator: str
    keys: Path
    state: Path
    socket: Path
    trainer_args: Sequence[str] | None
    port: int = 0
    connect_timeout_s: float = 60.0


def serve(node: Node) -> None:
    """Take part until interrupted.

    *Guarantees*: a process that ends is started again; one that ends again and again ends this one, with the reason. No
    child outlives it (on Linux however it ends).

    Raises:
        FedlearnError: the trainer does not start, the coordinator is not reached or does not know this node.
        KeyboardInterrupt: at Ctrl-C and SIGTERM.
    """
    for name in (NODE_KEY, CA):
        if not (node.keys / name).is_file():
            fix = "--keys with the folder keys/nodes/NAME that fedlearn.deploy.keys made"
            raise NodeError(f"{node.keys} has no {name}\n  try       {fix}")
    node.state.mkdir(parents=True, exist_ok=True)
    with Children() as children:
        watched = [children.start(_trainer(node, node.trainer_args))] if node.trainer_args is not None else []
        children.wait_for(lambda: is_serving(node.socket), f"the trainer at {node.socket}", timeout_s=TRAINER_TIMEOUT_S)
        _wait_for_coordinator(node)
        carrier = children.start(_supernode(node))
        told = False
        while True:
            if not told and JOINED_MESSAGE in carrier.read_output():
                sys.stdout.write(f"node of {node.coordinator}   logs in {node.state.resolve()}\nready\n")
                sys.stdout.flush()
                told = True
            for child in watched:
                child.restart_if_ended()
            if BACKLOG_MESSAGE in carrier.read_output():
                carrier.stop()
                carrier.reap(time.monotonic() + GRACE_S)
            if carrier.exit_code is not None:
                _refuse_if_not_let_in(carrier, node)
                _wait_for_coordinator(node)
                carrier.restart_if_ended()
            time.sleep(POLL_INTERVAL_S)


def _refuse_if_not_let_in(carrier: Child, node: Node) -> None:
    if REJECTED_MESSAGE in carrier.read_output():
        fix = "ask whoever keeps the federation's keys: this one is revoked, or not among them"
        raise NodeError(f"{node.coordinator} does not let this node's key in\n  try       {fix}")


def is_serving(socket: Path, *, timeout_s: float = 1.0) -> bool:
    """Whether a trainer answers there, by gRPC's standard health service."""
    with grpc.insecure_channel(f"unix:{socket.resolve()}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


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
    parser = command_parser("fedlearn.deploy.node", "Take part in a federation with the data of this site.")
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT")
    parser.add_argument("--keys", type=Path, required=True, help="this node's part of the keys")
    parser.add_argument("--state", type=Path, default=Path("node"), help="logs, and what clients remember")
    parser.add_argument("--socket", type=Path, help="where the trainer answers; STATE/trainer.sock")
    parser.add_argument("--port", type=int, default=0, help="local to this machine; 0 takes a free one")
    parser.add_argument(
        "--connect-timeout", type=float, default=60.0, help="seconds to wait for the coordinator at the start"
    )
    own = parser.add_argument_group("the trainer (leave --policy out where it is run apart)")
    own.add_argument(
        "--policy", type=Path, help="what this node accepts: python -m fedlearn.deploy.node_side.policy prints one"
    )
    own.add_argument("--data", type=Path, help="a folder with the data; without it the scenario searches")
    own.add_argument("--client", type=int, action="append", default=[], help="a client that lives here; repeat")
    own.add_argument("--framework", choices=("torch", "jax"), help="to train with; the order's where it is left out")
    own.add_argument("--device", help="to train on, e.g. cuda:0")
    own.add_argument("--group", help="a group that may open the socket")
    return parser


def node_from_args(args: argparse.Namespace) -> Node:
    """What the command line says.

    Raises:
        NodeError: a policy without a client.
    """
    socket = args.socket or args.state / "trainer.sock"
    return Node(
        coordinator=args.coordinator,
        keys=args.keys,
        state=args.state,
        socket=socket,
        trainer_args=_options(args) if args.policy else None,
        port=args.port,
        connect_timeout_s=args.connect_timeout,
    )


def _options(args: argparse.Namespace) -> list[str]:
    if not args.client:
        raise NodeError(
            "--client is missing\n  expected  the number of each client that lives here\n  try       --client 0"
        )
    options = ["--policy", str(args.policy.resolve()), "--client-states", str(_client_states_folder(args.state))]
    options += ["--keys", str(args.keys.resolve())]
    options += [word for client in args.client for word in ("--client", str(client))]
    for name in ("framework", "device", "group"):
        if getattr(args, name):
            options += [f"--{name}", getattr(args, name)]
    return options + (["--data", str(args.data.resolve())] if args.data else [])


def _client_states_folder(state: Path) -> Path:
    folder, old = state / CLIENT_STATES_FOLDER, state / OLD_CLIENT_STATES_FOLDER
    if old.exists() and not folder.exists():  # it may hold what this node's data have paid for
        expected = f"client states of this version in {folder}"
        raise NodeError(f"{old} is of an earlier version\n  expected  {expected}\n  try       mv {old} {folder}")
    return folder.resolve()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 stopped by Ctrl-C or SIGTERM, 2 cannot take part."""
    return run_command(build_parser(), _serve_until_stopped, argv)


def _serve_until_stopped(**options: Any) -> int:
    try:
        serve(node_from_args(argparse.Namespace(**options)))
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
