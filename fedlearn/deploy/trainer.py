"""Run a node's trainer: ``python -m fedlearn.deploy.trainer``, a long-lived process of the node's operator.

It serves requests on a Unix socket over gRPC, with the standard health service. Only its own user may open the socket.
With ``--group``, a group may open it too, so the messenger can run as another user. Frameworks are imported once. Data
and compiled code stay in memory from round to round. After ``--idle-timeout`` seconds without a request the trainer
starts anew, and so frees this memory.
"""

from __future__ import annotations

import grp
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.core.import_path import search_working_folder_last
from fedlearn.core.spool import Spool
from fedlearn.core.version import VERSION
from fedlearn.deploy.config_file import add_config_option
from fedlearn.deploy.idle_restart import Activity, add_idle_option, replace_process, wait_until_stopped
from fedlearn.deploy.log_format import add_log_option, configure_logging, use_log_format
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.data_files import record_opened_files
from fedlearn.deploy.node_side.experiment import NodeConfig
from fedlearn.deploy.node_side.masking_keys import read_masking_keys
from fedlearn.deploy.node_side.policy_file import PolicyFile
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.deploy.node_side.service import NodeService
from fedlearn.deploy.node_side.trainer_client import split_chunks
from fedlearn.errors import FedlearnError, SettingError, require
from fedlearn.protocol import messages
from fedlearn.runner.environment import set_environment

SERVICE = "fedlearn.Trainer"
MAX_SOCKET_PATH_BYTES = 100  # limit of the path of a Unix socket, with some room
GRACE_S = 5.0  # seconds for the response in progress when the trainer stops
log = logging.getLogger(__name__)


def serve(
    service: NodeService,
    socket: Path,
    *,
    group: str | None = None,
    prepare: Callable[[], None] = lambda: None,
    activity: Activity | None = None,
    folder: Path | None = None,
) -> grpc.Server:
    """Serve requests on a Unix socket, until the returned server is stopped.

    Args:
        service: service that responds to requests.
        socket: path of the socket; the old socket of a killed trainer is replaced.
        group: group that may open the socket too; None: only this user may open it.
        prepare: function that is called before each request.
        activity: counter of the requests; None: they are not counted.
        folder: folder on a disk for large requests; None: the system's folder for temporary files.

    Raises:
        FedlearnError: Another trainer uses the socket, or the socket cannot be created.
    """
    _remove_old_socket(socket)
    server = grpc.server(ThreadPoolExecutor(max_workers=8), options=(("grpc.so_reuseport", 0),))
    counter = activity or Activity(0)
    call = grpc.stream_stream_rpc_method_handler(
        lambda request, context: _respond(service, request, prepare, counter, folder)
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Call": call}),))
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    for name in ("", SERVICE):
        state.set(name, health_pb2.HealthCheckResponse.SERVING)
    previous_mask = os.umask(0o177)  # other users can open the socket at no moment
    try:
        server.add_insecure_port(f"unix:{socket}")
        server.start()
    except RuntimeError as error:
        raise FedlearnError(
            f"--socket {socket} cannot be created: {error}\n  advice    a path in a folder that this user can write"
        ) from error
    finally:
        os.umask(previous_mask)
    if group is not None:
        os.chown(socket, -1, grp.getgrnam(group).gr_gid)
        os.chmod(socket, 0o660)
    return server


def _respond(
    service: NodeService, request: Iterator[bytes], prepare: Callable[[], None], activity: Activity, folder: Path | None
) -> Iterator[bytes]:
    with activity.request():
        received = Spool(folder)
        for part in request:
            received.write(part)
            if len(received) > messages.MAX_REQUEST_BYTES:  # the service refuses such a large request
                break
        prepare()
        yield from split_chunks(service.respond_in_parts(received.view()))


def _import_frameworks(framework: str | None) -> None:
    """Import the modules that a round needs, at the first request. A node without work then uses little memory."""
    for module in ("sklearn.metrics", *([f"fedlearn.trainers.{framework}"] if framework else [])):
        import_module(module)


def _remove_old_socket(socket: Path) -> None:
    is_short = len(os.fsencode(socket)) <= MAX_SOCKET_PATH_BYTES
    expected = f"a path of at most {MAX_SOCKET_PATH_BYTES} bytes"
    require(is_short, "--socket", socket, expected, "--socket /run/fedlearn/trainer.sock")
    if not socket.exists():
        socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return
    require(socket.is_socket(), "--socket", socket, "a path without another file", "--socket trainer.sock")
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=1)
        except grpc.FutureTimeoutError:
            socket.unlink()
            return
    raise SettingError("--socket", socket, "a socket that no other trainer uses", "choose another path")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 stopped by Ctrl-C or SIGTERM, 2 cannot start."""
    return run_command(build_parser(), _serve_until_stopped, argv)


def _serve_until_stopped(
    *,
    socket: Path,
    clients: Sequence[int],
    policy: Path,
    client_states: Path,
    keys: Path | None,
    group: str | None,
    idle_timeout: float,
    log_format: str | None,
    **options: Any,
) -> int:
    use_log_format(log_format)
    configure_logging()
    activity = Activity(idle_timeout)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    os.umask(0o077)  # client states and logs are for this user only
    set_environment(options["framework"] or "mixed")
    search_working_folder_last()
    try:
        masking_keys = read_masking_keys(keys) if keys else None
        config = NodeConfig(clients=tuple(clients), masking_keys=masking_keys, **options)
        policy_file = PolicyFile(policy)
        service = NodeService(config, policy_file, ClientStates(client_states))
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=policy_file.read_again).start())
        record_opened_files()
        service.audit.record_start(policy=service.policy, clients=config.clients, version=VERSION)
        prepare = partial(_import_frameworks, config.framework)
        server = serve(service, socket, group=group, prepare=prepare, activity=activity, folder=client_states)
    except (OSError, KeyError) as error:
        raise FedlearnError(str(error)) from error
    log.info("trainer of clients %s serves requests at %s", ", ".join(map(str, config.clients)), socket)
    wait_until_stopped(stopped, activity, partial(_can_restart, policy_file, keys), partial(_restart, server, stopped))
    server.stop(GRACE_S).wait(GRACE_S + 1)
    socket.unlink(missing_ok=True)
    log.info("trainer stopped")
    return DONE


def _can_restart(policy_file: PolicyFile, keys: Path | None) -> bool:
    """Return whether a new start would read its files. A broken file must not end a trainer that works."""
    try:
        policy_file.current()
        if keys:
            read_masking_keys(keys)
    except (PolicyViolation, FedlearnError, OSError):
        return False
    return True


def _restart(server: grpc.Server, stopped: threading.Event) -> None:
    log.info("no request since --idle-timeout: the trainer starts anew, to free its memory")
    replace_process(server, stopped)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "fedlearn.deploy.trainer", "Train with the data of this node, in response to requests on a socket."
    )
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to serve requests on")
    parser.add_argument(
        "--client", type=int, action="append", required=True, dest="clients", help="id of a client of this node; repeat"
    )
    parser.add_argument("--policy", type=Path, required=True, help="file with the policy of this node")
    parser.add_argument("--client-states", type=Path, required=True, help="folder for the client states")
    parser.add_argument(
        "--keys", type=Path, help="folder with masking.key and masking.pub; without it, no secure aggregation"
    )
    parser.add_argument(
        "--data", type=Path, help="folder with the data; default: the folders that the scenario searches"
    )
    parser.add_argument("--framework", choices=("torch", "jax"), help="default: the framework of the request")
    parser.add_argument("--device", default="cpu", help="device that trains, e.g. cpu or cuda:0")
    parser.add_argument("--group", help="group that may open the socket too")
    add_idle_option(parser)
    add_log_option(parser)
    add_config_option(parser, "trainer.yaml")
    return parser


if __name__ == "__main__":
    code = main()
    if code != DONE:  # the trainer did not start
        sys.exit(code)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # an ordinary exit would wait until a client has finished its training
