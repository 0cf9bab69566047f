"""Run a node, one site of a federation: ``python -m fedlearn.deploy.node``.

A node has two processes. The trainer has the data and enforces the policy. The messenger carries messages and has no
access to data: it connects to the trainer through a socket. To run the two as different users, start the trainer with
its own command, and this command with ``--socket`` and without ``--policy``.
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

from fedlearn.advice import command
from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.deploy.config_file import add_config_option
from fedlearn.deploy.connectivity import ConnectionProblem, check_connection, is_final, parse_address
from fedlearn.deploy.idle_restart import add_idle_option
from fedlearn.deploy.key_files import CA, NODE_KEY
from fedlearn.deploy.log_format import add_log_option, use_log_format
from fedlearn.deploy.node_side.messenger_state import NOT_ADMITTED, STATE_FILE, read_problem
from fedlearn.deploy.node_side.trainer_client import TrainerClient
from fedlearn.deploy.processes import Child, Children, flower_environment, module_command, private_files
from fedlearn.deploy.proxies import find_proxy
from fedlearn.deploy.state_lock import locked_state
from fedlearn.deploy.supervision import Watch
from fedlearn.errors import FedlearnError

CLIENT_STATES_FOLDER, OLD_CLIENT_STATES_FOLDER = "client_states", "memory"  # folders in --state
TRAINER_TIMEOUT_S = 60.0  # seconds for the trainer to start
POLL_INTERVAL_S = 0.5  # seconds between two checks of the processes
PARTS = ("messenger", "coordinator", "trainer")  # the path from the coordinator to the trainer


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
        connect_timeout_s: seconds to wait for the coordinator, default 60.
        metrics_port: port of metrics for Prometheus on loopback; 0 takes a free port; None, the default: no metrics.
    """

    coordinator: str
    keys: Path
    state: Path
    socket: Path
    trainer_args: Sequence[str] | None
    connect_timeout_s: float = 60.0
    metrics_port: int | None = None


def serve(node: Node) -> None:
    """Run a node until the process is interrupted.

    Guarantees:
        Each process is watched by a probe of its work. A process that ends, or that does not work for a minute, is
        restarted. A line names a part that does not work, and a second line reports that it works again. A process that
        ends too often ends the node, with the reason. No child process outlives the node (on Linux even after SIGKILL).

    Raises:
        FedlearnError: The trainer does not start, the coordinator is unreachable or does not admit this node, or
            another process uses the state folder.
        KeyboardInterrupt: The process received Ctrl-C or SIGTERM.
    """
    for name in (NODE_KEY, CA):
        if not (node.keys / name).is_file():
            fix = "choose the folder keys/nodes/NAME that python -m fedlearn.deploy.keys created"
            raise NodeError(f"--keys {node.keys} has no {name}\n  advice    {fix}")
    with locked_state(node.state, "node"):
        _serve(node)


def _serve(node: Node) -> None:
    (node.state / STATE_FILE).unlink(missing_ok=True)  # an earlier process has left it
    trainer_client = TrainerClient(node.socket.resolve())
    with Children() as children:
        trainer = children.start(_trainer(node, node.trainer_args)) if node.trainer_args is not None else None
        _wait_for_coordinator(node)
        messenger = children.start(_messenger(node))  # it ends the last connection, and connects when the trainer works
        children.wait_for(
            lambda: not trainer_client.problem(), f"the trainer at {node.socket}", timeout_s=TRAINER_TIMEOUT_S
        )
        metrics = _start_metrics(node, [trainer, messenger] if trainer else [messenger])
        watches = [
            Watch("the trainer", lambda: read_problem(node.state, "trainer"), trainer),
            Watch("the messenger", lambda: read_problem(node.state, "messenger"), messenger),
            Watch("the connection to the coordinator", lambda: read_problem(node.state, "coordinator")),
        ]
        signal.signal(signal.SIGHUP, lambda *_: _pass_on(signal.SIGHUP, trainer))
        is_joined = False
        while True:
            if messenger.exit_code == NOT_ADMITTED:
                fix = "use the keys of an admitted node; this key is revoked, or belongs to another federation"
                raise NodeError(f"{node.coordinator} does not admit the key of this node\n  advice    {fix}")
            for watch in watches:
                watch.check()
            if not is_joined and all(not read_problem(node.state, part) for part in PARTS):
                sys.stdout.write(f"node of {node.coordinator}   logs in {node.state.resolve()}\n{metrics}ready\n")
                sys.stdout.flush()
                is_joined = True
            time.sleep(POLL_INTERVAL_S)


def _start_metrics(node: Node, children: Sequence[Child]) -> str:
    """Serve the metrics, and return the line with their address; empty without metrics."""
    if node.metrics_port is None:
        return ""
    from fedlearn.deploy.node_side.metrics import start_metrics  # the web library is not loaded without need

    # with a trainer of another user, this process may not read the audit log
    client_states = _client_states_folder(node.state) if node.trainer_args is not None else None
    return f"{start_metrics(node.metrics_port, node.state, children, client_states)}\n"


def _pass_on(number: int, child: Child | None) -> None:
    """Send a signal to a process, e.g. SIGHUP, after which the trainer reads its policy again."""
    if child is not None and child.process is not None and child.exit_code is None:
        child.process.send_signal(number)


def _wait_for_coordinator(node: Node) -> None:
    until, is_first = time.monotonic() + node.connect_timeout_s, True
    if proxy := find_proxy(*parse_address(node.coordinator)):
        sys.stdout.write(f"{proxy} used\n")
        sys.stdout.flush()
    while True:
        try:
            return check_connection(node.coordinator, node.keys / CA, timeout_s=min(15.0, node.connect_timeout_s + 1.0))
        except ConnectionProblem as error:
            if time.monotonic() > until or is_final(error):
                raise
            if is_first:
                sys.stderr.write(f"{str(error).splitlines()[0]}; trying again\n")
                sys.stderr.flush()
            is_first = False
            time.sleep(1.0)


def _trainer(node: Node, options: Sequence[str]) -> Child:
    command = [*module_command("fedlearn.deploy.trainer"), "--socket", str(node.socket.resolve()), *options]
    return Child("the trainer", command, node.state / "trainer.log", parent_death_signal=signal.SIGTERM)


def _messenger(node: Node) -> Child:
    command = [
        *module_command("fedlearn.deploy.node_side.messenger"),
        *("--coordinator", node.coordinator, "--keys", str(node.keys)),
        *("--socket", str(node.socket.resolve()), "--state", str(node.state.resolve())),
    ]
    env = flower_environment(node.state / "flower")
    return Child("the messenger", command, node.state / "messenger.log", env, parent_death_signal=signal.SIGTERM)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser("fedlearn.deploy.node", "Join a federation with the data of this site.")
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="address")
    parser.add_argument("--keys", type=Path, required=True, help="folder with the keys of this node")
    parser.add_argument("--state", type=Path, default=Path("node"), help="folder for logs and client states")
    parser.add_argument("--socket", type=Path, help="Unix socket of the trainer; default: STATE/trainer.sock")
    parser.add_argument(
        "--connect-timeout", type=float, default=60.0, help="seconds to wait for the coordinator at the start"
    )
    parser.add_argument(
        "--metrics", type=int, metavar="PORT", help="port of metrics for Prometheus on 127.0.0.1; default: none"
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
    add_idle_option(trainer)
    add_log_option(parser)
    add_config_option(parser, "node.yaml")
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
        connect_timeout_s=args.connect_timeout,
        metrics_port=args.metrics,
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
    options += ["--idle-timeout", f"{args.idle_timeout:g}"]
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


def _serve_until_stopped(*, log_format: str | None, **options: Any) -> int:
    use_log_format(log_format)
    try:
        with private_files():
            serve(node_from_args(argparse.Namespace(**options)))
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
