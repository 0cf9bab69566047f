"""``python -m fedlearn.deploy.coordinator``: where nodes and operators meet, and where runs are conducted.

It is Flower's SuperLink with TLS, node authentication and a database, beside Flower's SuperExec, which starts a process
for each run; both are watched, and end with this process.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization as formats
from filelock import FileLock, Timeout

from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.core.import_path import WORKING_FOLDER_ENV
from fedlearn.deploy.connectivity import ConnectionProblem, check_connection, free_port, is_final
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.coordinator_side.superlink import TOKEN_FILE_ENV
from fedlearn.deploy.keys import ALLOWED, CA, CERTIFICATE, SECRET, SERVER_KEY, TOKEN, KeysError, expiry
from fedlearn.deploy.processes import Child, Children, flower_environment, module_command, python_command
from fedlearn.errors import FedlearnError, is_count, require
from fedlearn.flower.compat import START_SUPEREXEC

# environment: where run folders lie, the keys of those who may join, and the modules that submitters may name
RUNS_ENV, NODES_ENV, ALLOW_ENV = "FEDLEARN_RUNS", "FEDLEARN_NODES", "FEDLEARN_ALLOW_TARGETS"
ADDRESS_FILE = "address"  # a file in the state folder: where the coordinator listens
START_TIMEOUT_S = 60.0
SYNC_INTERVAL_S = 1.0  # between two looks at children and at who may join


class CoordinatorError(FedlearnError):
    """The coordinator cannot start."""


def serve(keys: Path, state: Path, runs: Path, *, host: str, port: int, allow_targets: Sequence[str] = ()) -> None:
    """Serve until interrupted.

    Args:
        keys: the coordinator's part of the keys.
        state: database, logs and Flower's files; made if absent.
        runs: a folder for each run; made if absent.
        host: the interface to listen on; ``0.0.0.0`` for all.
        port: 0 takes a free one, which is then found in ``state/address``.
        allow_targets: modules, beside fedlearn's, whose code a submitter may name in settings.

    *Guarantees*: a child that ends is started again and finds all runs, nodes and messages in the database; one that
    ends again and again ends this process, with the reason. No child outlives it (on Linux however it ends).

    Raises:
        FedlearnError: keys are missing or out of date, the port is taken, the state is in use.
        KeyboardInterrupt: at Ctrl-C and SIGTERM.
    """
    _check_keys(keys)
    for folder in (state, runs):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CoordinatorError(f"{state} is in use by another coordinator\n  try       --state DIR") from None
    with lock:
        port = port or free_port(host)
        _refuse_if_taken(host, port)
        _serve(keys, state, runs, host, port, allow_targets)


def _serve(keys: Path, state: Path, runs: Path, host: str, port: int, allow_targets: Sequence[str]) -> None:
    local = f"{local_host_of(host)}:{port}"
    env = flower_environment(state / "flower")
    env |= {RUNS_ENV: str(runs.resolve()), NODES_ENV: str((keys / ALLOWED).resolve())}
    env |= {ALLOW_ENV: ",".join(allow_targets), WORKING_FOLDER_ENV: os.getcwd()}
    env[TOKEN_FILE_ENV] = str((keys / TOKEN).resolve())
    with Children() as children:
        link = children.start(Child("the SuperLink", _superlink(keys, state, host, port), state / "superlink.log", env))
        children.wait_for(lambda: _answers(local, keys), "the SuperLink answers", timeout_s=START_TIMEOUT_S)
        _refuse_if_open_to_all(local, keys)
        control = CoordinatorClient(local, keys)
        for run_id in control.list_running():  # its process ended with the coordinator before this one
            control.stop(run_id)
            sys.stdout.write(f"run {run_id} was cut off; python -m fedlearn.deploy.submit --resume FOLDER goes on\n")
        sync_nodes(control, keys)
        runner = children.start(Child("the SuperExec", _superexec(keys, local), state / "superexec.log", env, cwd=runs))
        (state / ADDRESS_FILE).write_text(f"{local}\n", encoding="ascii")
        sys.stdout.write(
            f"coordinator   https://{host}:{port}   (health: /health)\n"
            f"runs          {runs.resolve()}\nlogs          {state.resolve()}\nready\n"
        )
        sys.stdout.flush()
        _watch([link, runner], control, keys)


def _watch(children: Sequence[Child], control: CoordinatorClient, keys: Path) -> None:
    seen = None
    while True:
        for child in children:
            if child.restart_if_ended():
                seen = None
        files = sorted(path.name for path in (keys / ALLOWED).glob("*.pub"))
        if files != seen:
            with suppress(ConnectionProblem):  # it is starting again
                sync_nodes(control, keys)
                seen = files
        time.sleep(SYNC_INTERVAL_S)


def sync_nodes(control: CoordinatorClient, keys: Path) -> None:
    """Let exactly those nodes join whose public keys lie in ``keys/allowed``.

    Raises:
        KeysError: a file there is no public key.
    """
    wanted = {_pem(path): path.stem for path in sorted((keys / ALLOWED).glob("*.pub"))}
    known = control.nodes()
    for key in wanted.keys() - known.keys():
        control.register_node(wanted[key], key)
        sys.stdout.write(f"node {wanted[key]} may join\n")
    for key in known.keys() - wanted.keys():
        control.unregister_node(known[key])
        sys.stdout.write(f"node with id {known[key]} may join no more\n")
    sys.stdout.flush()


def _pem(path: Path) -> bytes:
    try:
        key = formats.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise KeysError(f"{path} is not a public key: {error}") from error
    return key.public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo)


def _superlink(keys: Path, state: Path, host: str, port: int) -> list[str]:
    return [
        *module_command("fedlearn.deploy.coordinator_side.superlink"),
        *("--ssl-ca-certfile", str(keys / CA), "--ssl-certfile", str(keys / CERTIFICATE)),
        *("--ssl-keyfile", str(keys / SERVER_KEY), "--enable-supernode-auth"),
        *("--database", str((state / "flower.db").resolve()), "--disable-runtime-dependency-installation"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(keys / SECRET)),
        *("--host", host, "--port", str(port)),
    ]


def _superexec(keys: Path, address: str) -> list[str]:
    return [
        *(*python_command(), "-c", START_SUPEREXEC, "--runtime-api-address", address),
        *("--root-certificates", str((keys / CA).resolve())),
        *("--superexec-auth-secret-file", str((keys / SECRET).resolve()), "--parent-pid", str(os.getpid())),
    ]


def _answers(address: str, keys: Path) -> bool:
    try:
        check_connection(address, keys / CA, timeout_s=2.0)
    except ConnectionProblem as error:
        if is_final(error):
            raise
        return False
    return True


def _refuse_if_open_to_all(address: str, keys: Path) -> None:
    """Try the door: a Flower that no longer asks our `OperatorToken` must not be served from."""
    stranger = CoordinatorClient(address, keys, token="none")
    try:
        stranger.nodes()
    except ConnectionProblem:
        return
    finally:
        stranger.close()
    raise CoordinatorError(
        "this Flower lets anybody start runs\n  expected  flwr 1.41 or 1.42\n  try       pip install flwr==1.41.0"
    )


def _check_keys(keys: Path) -> None:
    ends = expiry(keys / CERTIFICATE)
    left = ends.timestamp() - time.time()
    fix = "python -m fedlearn.deploy.keys renew FOLDER"
    if left <= 0:
        raise KeysError(f"the server certificate ended on {ends:%Y-%m-%d %H:%M} UTC\n  try       {fix}")
    if left < 30 * 86400:
        sys.stderr.write(f"the server certificate ends on {ends:%Y-%m-%d}\n  try       {fix}\n")


def _refuse_if_taken(host: str, port: int) -> None:
    require(is_count(port) and port < 65536, "--port", port, "a port number, or 0 for any", "--port 8000")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        fix = "--port 0, which takes a free one, or --host with an address of this machine"
        raise CoordinatorError(f"{host}:{port} cannot be used: {error.strerror}\n  try       {fix}") from error


def local_host_of(host: str) -> str:
    """The name under which this machine reaches what listens on ``host``."""
    return {"0.0.0.0": "localhost", "::": "localhost", "127.0.0.1": "localhost"}.get(host, host)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser("fedlearn.deploy.coordinator", "Admit nodes, accept runs from operators, and conduct them.")
    parser.add_argument("--keys", type=Path, default=Path("keys/coordinator"), help="its part of the keys")
    parser.add_argument("--state", type=Path, default=Path("coordinator"), help="database and logs")
    parser.add_argument("--runs", type=Path, default=Path("outputs"), help="where runs leave their folders")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one: see STATE/address")
    parser.add_argument(
        "--allow-targets", action="append", default=[], metavar="MODULE", help="a module that settings may name"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 stopped by Ctrl-C or SIGTERM, 2 could not start."""
    return run_command(build_parser(), _serve_until_stopped, argv)


def _serve_until_stopped(**options: Any) -> int:
    try:
        serve(**options)
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
