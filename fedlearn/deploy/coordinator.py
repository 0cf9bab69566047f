"""Run the coordinator of a federation: ``python -m fedlearn.deploy.coordinator``.

It starts two processes of Flower. The SuperLink connects nodes and operators with TLS and node authentication, and has
the database. The SuperExec starts a process for each run. Both are restarted if they fail, and end with this process.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.core.import_path import WORKING_FOLDER_ENV
from fedlearn.deploy.certificates import expiry
from fedlearn.deploy.config_file import add_config_option
from fedlearn.deploy.connectivity import ConnectionProblem, check_connection, free_port, is_final, join_address
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.coordinator_side.environment import (
    LOCAL_DIGEST_ENV,
    NODES_ENV,
    PERSONS_ENV,
    RUNS_ENV,
    STATE_ENV,
)
from fedlearn.deploy.coordinator_side.key_sync import KeySync
from fedlearn.deploy.coordinator_side.probes import LinkProbe, executor_problem
from fedlearn.deploy.coordinator_side.run_recovery import RunRecovery
from fedlearn.deploy.coordinator_side.web_pages import Pages, Ports, open_ports
from fedlearn.deploy.key_files import ALLOWED, CA, CERTIFICATE, SECRET, SERVER_KEY, KeysError
from fedlearn.deploy.log_format import add_log_option, use_log_format
from fedlearn.deploy.persons import PERSONS_FILE, may_submit, new_token, read_persons, token_digest
from fedlearn.deploy.processes import Child, Children, flower_environment, module_command, private_files
from fedlearn.deploy.proxies import LOCAL_HOSTS, exclude_from_proxies
from fedlearn.deploy.state_lock import locked_state
from fedlearn.deploy.supervision import Watch
from fedlearn.errors import FedlearnError, is_count, require
from fedlearn.runner.consent import ALLOW_ENV
from fedlearn.runner.registry import Registry, installed_registry, read_builders

BUILDERS_ENV = "FEDLEARN_BUILDERS"  # environment variable: builders of the operator as JSON
ADDRESS_FILE = "address"  # in the state folder: address of the coordinator, host:port
START_TIMEOUT_S = 60.0  # seconds for the SuperLink to start
SYNC_INTERVAL_S = 1.0  # seconds between two checks of the processes and of the admitted nodes


class CoordinatorError(FedlearnError):
    """Report a coordinator that cannot start."""


def serve(
    keys: Path,
    state: Path,
    runs: Path,
    *,
    host: str,
    port: int,
    builders: Path | None = None,
    web: int | None = None,
    metrics: int | None = None,
) -> None:
    """Serve nodes and operators until the process is interrupted.

    Args:
        keys: folder with the coordinator's keys.
        state: folder for database, logs and Flower's files; it is created if it is missing.
        runs: folder for the run folders; it is created if it is missing.
        host: interface to listen on; ``0.0.0.0`` for all interfaces.
        port: port to listen on, 0 to 65535; 0 takes a free port and writes it to ``state/address``.
        builders: YAML file with the operator's builders, in the form of ``builders`` in a policy; None: no builders.
        web: port of the page with nodes and runs, at the same interface; 0 takes a free port; None: no page.
        metrics: port of the metrics for Prometheus, at loopback; 0 takes a free port; None: no metrics.

    Guarantees:
        A process that ends or does not work is restarted, and reads all runs, nodes and messages from the database. A
        run whose process has died resumes from its last checkpoint. A process that ends too often ends the coordinator,
        with the reason. No child process outlives the coordinator (on Linux even after SIGKILL).

    Raises:
        FedlearnError: Keys are missing or expired, the port is taken, another coordinator uses the state folder, or the
            file with builders is wrong.
        KeyboardInterrupt: The process received Ctrl-C or SIGTERM.
    """
    _check_keys(keys)
    registry = installed_registry().with_builders(read_builders(builders) if builders else {})
    runs.mkdir(parents=True, exist_ok=True)
    with locked_state(state, "coordinator"):
        host = host.strip("[]")  # an IPv6 address may have brackets
        port = port or _free_port(host)
        _refuse_if_taken(host, port)
        _serve(keys, state, runs, host, port, registry, open_ports(host, web, metrics))


def _serve(keys: Path, state: Path, runs: Path, host: str, port: int, registry: Registry, ports: Ports) -> None:
    local = join_address(local_host_of(host), port)
    exclude_from_proxies(*LOCAL_HOSTS, local_host_of(host))  # the coordinator calls itself
    env = flower_environment(state / "flower")
    env |= {RUNS_ENV: str(runs.resolve()), NODES_ENV: str((keys / ALLOWED).resolve()), STATE_ENV: str(state.resolve())}
    env |= {BUILDERS_ENV: json.dumps(registry.added), ALLOW_ENV: ",".join(registry.modules)}
    env[WORKING_FOLDER_ENV] = os.getcwd()
    token = new_token()  # only its digest leaves this process
    env |= {PERSONS_ENV: str((keys / PERSONS_FILE).resolve()), LOCAL_DIGEST_ENV: token_digest(token.encode())}
    with Children() as children:
        link = children.start(Child("the SuperLink", _superlink(keys, state, host, port), state / "superlink.log", env))
        children.wait_for(lambda: _is_reachable(local, keys), "the SuperLink is reachable", timeout_s=START_TIMEOUT_S)
        _require_token_check(local, keys)
        _require_limits(local, keys)
        control = CoordinatorClient(local, keys, token=token)
        allowed = partial(may_submit, keys / PERSONS_FILE)
        recovery = RunRecovery(control, state.resolve(), runs.resolve(), may_submit=allowed)
        recovery.recover_all()
        key_sync = KeySync(control, keys, state)
        key_sync.check()
        runner = children.start(Child("the SuperExec", _superexec(keys, local), state / "superexec.log", env, cwd=runs))
        pages = Pages(ports=ports, keys=keys, state=state, runs=runs, address=local, token=token)
        page_lines = "".join(f"{line}\n" for line in pages.start(host))
        (state / ADDRESS_FILE).write_text(f"{local}\n", encoding="ascii")
        sys.stdout.write(
            f"coordinator   https://{join_address(host, port)}   (health: /health)\n"
            f"runs          {runs.resolve()}\nlogs          {state.resolve()}\n{page_lines}ready\n"
        )
        sys.stdout.flush()
        probe = LinkProbe(lambda: CoordinatorClient(local, keys, token=token), state, lambda: link.started_at)
        probe.start()
        watches = [
            Watch("the SuperLink", probe.problem, link, on_restart=key_sync.forget),
            Watch("the SuperExec", lambda: executor_problem(state, probe), runner),
        ]
        _watch(watches, probe, key_sync, recovery)


def _watch(watches: Sequence[Watch], probe: LinkProbe, key_sync: KeySync, recovery: RunRecovery) -> None:
    """Restart processes that do not work, resume runs, and admit or remove nodes when the key files change."""
    while True:
        for watch in watches:
            watch.check()
        if not probe.problem():
            key_sync.check()
            recovery.check()
        time.sleep(SYNC_INTERVAL_S)


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
        *(*module_command("fedlearn.deploy.coordinator_side.superexec"), "--runtime-api-address", address),
        *("--root-certificates", str((keys / CA).resolve())),
        *("--superexec-auth-secret-file", str((keys / SECRET).resolve()), "--parent-pid", str(os.getpid())),
    ]


def _is_reachable(address: str, keys: Path) -> bool:
    try:
        check_connection(address, keys / CA, timeout_s=2.0)
    except ConnectionProblem as error:
        if is_final(error):
            raise
        return False
    return True


def _require_limits(address: str, keys: Path) -> None:
    """Check that `RequestLimits` stands in front of the SuperLink, which otherwise shows a description of its APIs.

    Raises:
        CoordinatorError: A future version of Flower ignores `RequestLimits`.
    """
    trust = ssl.create_default_context(cafile=str(keys / CA))
    response = httpx.get(f"https://{address}/openapi.json", verify=trust, timeout=10.0, trust_env=False)
    if response.status_code != httpx.codes.NOT_FOUND:
        raise CoordinatorError(
            "this version of Flower reads messages of unknown senders\n"
            "  expected  flwr 1.41 or 1.42\n  try       pip install flwr==1.41.0"
        )


def _require_token_check(address: str, keys: Path) -> None:
    """Check that the SuperLink refuses a wrong token.

    A future version of Flower may ignore our `Persons`. Every client could then start runs.

    Raises:
        CoordinatorError: The SuperLink accepts a wrong token.
    """
    stranger = CoordinatorClient(address, keys, token="none")
    try:
        stranger.nodes()
    except ConnectionProblem:
        return
    finally:
        stranger.close()
    raise CoordinatorError(
        "this version of Flower accepts runs without a token\n"
        "  expected  flwr 1.41 or 1.42\n  try       pip install flwr==1.41.0"
    )


def _check_keys(keys: Path) -> None:
    expires = expiry(keys / CERTIFICATE)
    if not any(not person.revoked for person in read_persons(keys / PERSONS_FILE).values()):
        fix = "python -m fedlearn.deploy.keys person add FOLDER NAME --role admin"
        raise KeysError(f"{keys / PERSONS_FILE} has no person\n  expected  at least one admin\n  advice    {fix}")
    remaining_s = expires.timestamp() - time.time()
    fix = "renew the certificate: python -m fedlearn.deploy.keys renew FOLDER"
    if remaining_s <= 0:
        raise KeysError(f"the server certificate expired on {expires:%Y-%m-%d %H:%M} UTC\n  advice    {fix}")
    if remaining_s < 30 * 86400:
        sys.stderr.write(f"the server certificate expires on {expires:%Y-%m-%d}\n  advice    {fix}\n")


def _free_port(host: str) -> int:
    try:
        return free_port(host)
    except OSError as error:
        problem = f"--host {host} cannot be used: {error.strerror}"
        raise CoordinatorError(
            f"{problem}\n  expected  an address of this machine\n  try       --host 127.0.0.1"
        ) from error


def _refuse_if_taken(host: str, port: int) -> None:
    require(is_count(port) and port < 65536, "--port", port, "a port number, or 0 for a free port", "--port 8000")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        expected = "a free port; 0 takes a free port" if is_taken else "an address of this machine"
        fix = "--port 0" if is_taken else "--host 127.0.0.1"
        address = join_address(host, port)
        message = f"{address} cannot be used: {error.strerror}\n  expected  {expected}\n  try       {fix}"
        raise CoordinatorError(message) from error


def local_host_of(host: str) -> str:
    """Return the host name for connections from this machine to a server that listens on ``host``."""
    return {"0.0.0.0": "localhost", "::": "localhost", "127.0.0.1": "localhost"}.get(host, host)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "fedlearn.deploy.coordinator", "Admit nodes, accept runs from submitters, and execute these runs."
    )
    parser.add_argument(
        "--keys", type=Path, default=Path("keys/coordinator"), help="folder with the coordinator's keys"
    )
    parser.add_argument("--state", type=Path, default=Path("coordinator"), help="folder for database and logs")
    parser.add_argument("--runs", type=Path, default=Path("outputs"), help="folder for run folders")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on; 0.0.0.0 for all interfaces")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 takes a free port, see STATE/address"
    )
    parser.add_argument(
        "--builders", type=Path, metavar="FILE", help="YAML file: group, name of an option, your builder"
    )
    parser.add_argument("--web", type=int, metavar="PORT", help="port of a page with nodes and runs; default: no page")
    parser.add_argument(
        "--metrics", type=int, metavar="PORT", help="port of metrics for Prometheus on 127.0.0.1; default: none"
    )
    add_log_option(parser)
    add_config_option(parser, "coordinator.yaml")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 stopped by Ctrl-C or SIGTERM, 2 cannot start."""
    return run_command(build_parser(), _serve_until_stopped, argv)


def _serve_until_stopped(*, log_format: str | None, **options: Any) -> int:
    use_log_format(log_format)
    try:
        with private_files():
            serve(**options)
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
