"""Use undocumented names of Flower. No other module uses them.

Flower documents ``flwr.app``, ``flwr.clientapp``, ``flwr.serverapp`` and ``flwr.simulation``. Each function below
checks the installed version before it uses another name, and imports that name only then.
"""

from __future__ import annotations

import secrets
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from fedlearn.core.private_names import PrivateNames

SERVER = 1  # node id of the ServerApp in Flower
MIN_PULLS_OF_PART = 20  # attempts to receive a part of a message, about one per second
MAX_BACKOFF_S = 2.0  # longest pause between two attempts to receive a part of a response
# middleware of the SuperLink -> start of the paths for which it does anything
PATHS_OF_MIDDLEWARE = {
    **dict.fromkeys(
        (
            "ControlSensitiveResponseMiddleware",
            "ControlAuthenticationMiddleware",
            "ControlLicenseMiddleware",
            "ControlEventLogMiddleware",
        ),
        "/v1/control/",
    ),
    "RuntimeTracingMiddleware": "/v1/runtime/",
    **dict.fromkeys(("NodeAuthMiddleware", "FleetEventLogMiddleware"), "/v1/fleet/"),
}
HEAD_TIMEOUT_S = 30.0  # seconds in which the head of an HTTP request must arrive

FLOWER = PrivateNames(
    library="flwr",
    tried=("1.41.0", "1.42.0"),
    lowest="1.41",
    below="1.43",
    extra="flower",
    names={
        "identity": tuple(f"flwr.supercore.task_identity:TaskIdentity.{name}_id" for name in ("run", "node", "task")),
        "grid": ("flwr.supercore.run:Run.create_empty", "flwr.clientapp.client_app:ClientAppException"),
        "messages": (
            "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
            "flwr.supercore.run:RunNotRunningException",
        ),
        "stalls": (
            "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
            "flwr.supercore.inflatable.inflatable_utils:ObjectUnavailableError",
            "flwr.supercore.inflatable.inflatable_utils:pull_objects",
            "flwr.superlink.grid.http_grid:pull_objects",
        ),
        "retries": (
            "flwr.supercore.inflatable.inflatable_utils:pull_objects.__kwdefaults__",
            "flwr.supercore.inflatable.inflatable_utils:pull_and_inflate_object_from_tree.__kwdefaults__",
        ),
        "fleet": (
            "flwr.app.message:remove_content_from_message",
            "flwr.common.serde:message_from_proto",
            "flwr.common.serde:message_to_proto",
            "flwr.proto.fleet_pb2:ActivateNodeRequest",
            "flwr.proto.fleet_pb2:DeactivateNodeRequest",
            "flwr.proto.fleet_pb2:PullMessagesRequest",
            "flwr.proto.fleet_pb2:PushMessagesRequest",
            "flwr.proto.heartbeat_pb2:SendNodeHeartbeatRequest",
            "flwr.proto.message_pb2:ConfirmMessageReceivedRequest",
            "flwr.proto.node_pb2:Node",
            "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects",
            "flwr.supercore.inflatable.inflatable_object:get_object_tree",
            "flwr.supercore.inflatable.inflatable_object:iterate_object_tree",
            "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute",
            "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf",
            "flwr.supercore.inflatable.inflatable_protobuf_utils:make_push_object_fn_protobuf",
            "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
            "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
            "flwr.supercore.inflatable.inflatable_utils:ObjectUnavailableError",
            "flwr.supercore.inflatable.inflatable_utils:pull_and_inflate_object_from_tree",
            "flwr.supercore.inflatable.inflatable_utils:push_objects",
            "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor",
            "flwr.supercore.primitives.asymmetric:public_key_to_bytes",
            "flwr.supernode.fleet_http_client:FleetHttpClient.from_server_address",
            "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor",
        ),
        "superexec": (
            "flwr.supercore.cli:flower_superexec",
            "flwr.supercore.superexec.run_superexec:get_executor",
            "flwr.supercore.superexec.executor:LaunchResult.accepted",
            "flwr.supercore.superexec.executor.subprocess_executor:SubprocessExecutor.launch",
            "flwr.supercore.superexec.executor.subprocess_executor:SubprocessExecutor.reconcile",
        ),
        "superlink": (
            "flwr.common.constant:ACCESS_TOKEN_KEY",
            "flwr.superlink.auth_plugin:NoOpControlAuthnPlugin.validate_tokens_in_metadata",
            "flwr.superlink.cli.flower_superlink",
            "flwr.superlink.cli:flower_superlink",
            "flwr.superlink.main:_get_middleware",
            "uvicorn.protocols.http.h11_impl:H11Protocol.connection_made",
            "uvicorn.protocols.http.h11_impl:H11Protocol.connection_lost",
            "flwr.common.constant:SYSTEM_TIME_TOLERANCE",
            "flwr.common.constant:TIMESTAMP_HEADER",
            "flwr.common.constant:TIMESTAMP_TOLERANCE",
            "flwr.supercore.constant:FLEET_HTTP_PUBLIC_KEY_HEADER",
            "flwr.supercore.constant:FLEET_HTTP_SIGNATURE_HEADER",
            "flwr.supercore.primitives.asymmetric:bytes_to_public_key",
            "flwr.supercore.primitives.asymmetric:verify_signature",
        ),
        "readmission": (
            "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.create_node",
            "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.session",
            "flwr.supercore.constant:NodeStatus.UNREGISTERED",
            "flwr.supercore.state.schema.linkstate_models:Node.public_key",
            "flwr.supercore.state.schema.linkstate_models:Node.status",
        ),
        "server app": (
            "flwr.superlink.cli:flwr_serverapp",
            "flwr.supercore.constant:TaskType.SERVER_APP",
            "flwr.supercore.superexec.executor.types:ExecutionSpec",
        ),
        "bundle": ("flwr.cli.build:build_fab_from_files", "flwr.supercore.fab:Fab"),
        "control": (
            "flwr.common.serde:fab_to_proto",
            "flwr.common.serde:user_config_from_proto",
            "flwr.common.serde:user_config_to_proto",
            "flwr.common.constant:HEARTBEAT_PATIENCE",
            "flwr.proto.control_pb2:ListNodesRequest",
            "flwr.proto.control_pb2:ListRunsRequest",
            "flwr.proto.control_pb2:ListRunsResponse",
            "flwr.proto.control_pb2:RegisterNodeRequest",
            "flwr.proto.control_pb2:StartRunRequest",
            "flwr.proto.control_pb2:StartRunResponse",
            "flwr.proto.control_pb2:StopRunRequest",
            "flwr.proto.control_pb2:StreamLogsRequest",
            "flwr.proto.control_pb2:UnregisterNodeRequest",
            "flwr.supercore.control:ControlHttpClient.from_server_address",
            "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor",
        ),
    },
)


def identify_as_server() -> None:
    """Allow this process to create messages as a server, unless Flower has given it an identity."""
    FLOWER.verify("identity")
    from flwr.supercore.task_identity import TaskIdentity

    try:
        _ = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER, 1


def empty_run() -> Any:
    """Return Flower's description of a run with id 1 and no app."""
    FLOWER.verify("grid")
    from flwr.supercore.run import Run

    return Run.create_empty(run_id=1)


def client_app_error() -> type[Exception]:
    """Return the exception class with which Flower reports an error in a ClientApp."""
    FLOWER.verify("grid")
    from flwr.clientapp.client_app import ClientAppException

    return ClientAppException


def set_message_id(message: Any, number: str) -> None:
    """Set the id of a message, as Flower's transports do.

    Args:
        message: a Flower message.
        number: the id.

    Raises:
        IncompatibleVersion: messages of this version of Flower have no such field.
    """
    metadata = vars(message.metadata)
    if "_message_id" not in metadata:
        raise FLOWER.incompatible("flwr.app:Metadata._message_id")
    metadata["_message_id"] = number


def copy_message(message: Any) -> Any:
    """Return a copy of a message with separate metadata. Both messages share the content.

    Raises:
        IncompatibleVersion: messages of this version of Flower have no such field.
    """
    if "_metadata" not in vars(message):
        raise FLOWER.incompatible("flwr.app:Message._metadata")
    copied = shallow_copy(message, type(message))
    vars(copied)["_metadata"] = shallow_copy(message.metadata, type(message.metadata))
    return copied


def shallow_copy(value: Any, kind: type) -> Any:
    """Return a shallow copy of a message, its metadata or an array. It is three times as fast as Flower's copy.

    Args:
        value: object to copy.
        kind: class of the copy.
    """
    copied: Any = object.__new__(kind)
    copied.__dict__.update(value.__dict__)
    return copied


def upload_error() -> type[Exception]:
    """Return the exception class with which Flower reports an interrupted upload."""
    FLOWER.verify("messages")
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    return ObjectPushError


def run_stopped_error() -> type[BaseException]:
    """Return the exception class with which Flower reports a stopped run."""
    FLOWER.verify("messages")
    from flwr.supercore.run import RunNotRunningException

    return RunNotRunningException


def retry_parts_after(seconds: float) -> None:
    """Set the waiting time before another request for missing parts of a message. Flower's default is one second.

    Flower announces a message before it uploads the parts. A receiver that polls quickly asks before the upload has
    ended. With the default, each message waits one second at three places for an upload of milliseconds.

    Args:
        seconds: waiting time before the second request.

    Raises:
        IncompatibleVersion: Flower's functions have no such argument.
    """
    FLOWER.verify("retries")
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects

    for function in (pull_objects, pull_and_inflate_object_from_tree):
        defaults: Any = function.__kwdefaults__
        if "initial_backoff" not in (defaults or {}):
            raise FLOWER.incompatible(f"{function.__module__}:{function.__name__}(initial_backoff=...)")
        defaults["initial_backoff"] = seconds


def end_stalled_pulls(stall_s: float) -> None:
    """Make Flower's grid give up a response of which no part has arrived for some seconds.

    A node announces a response before it uploads the parts. If the node, its messenger or the SuperLink is killed in
    between, Flower waits three minutes for the parts, and meanwhile receives no other response.

    Args:
        stall_s: seconds without a part, > 0. The response then counts as an error.
    """
    FLOWER.verify("stalls")
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.superlink.grid import http_grid

    def pull_objects(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **more: Any) -> dict[str, bytes]:
        arrived_at = [time.monotonic()]

        def pull(object_id: str) -> bytes:
            try:
                content = pull_object_fn(object_id)
            except inflatable_utils.ObjectUnavailableError:
                if time.monotonic() - arrived_at[0] > stall_s:
                    raise inflatable_utils.ObjectPullError(object_id, f"no part for {stall_s:g} s") from None
                raise
            arrived_at[0] = time.monotonic()
            return content

        return inflatable_utils.pull_objects(object_ids, pull, **{"backoff_cap": MAX_BACKOFF_S, **more})

    http_grid.pull_objects = pull_objects


def run_superexec(arguments: Sequence[str], executor: Any) -> None:
    """Run Flower's SuperExec with another way to start programs.

    Args:
        arguments: arguments of ``flower-superexec``.
        executor: result of `executor`.
    """
    FLOWER.verify("superexec")
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec import run_superexec as loop

    loop.get_executor = lambda *args, **settings: executor
    sys.argv = ["flower-superexec", *arguments]
    flower_superexec()


def executor(launch: Callable[[Any], None], reconcile: Callable[[], None]) -> Any:
    """Return an executor for Flower's SuperExec.

    Args:
        launch: starts the program for one message; its argument is Flower's description of the program.
        reconcile: called before each poll for messages.
    """
    FLOWER.verify("superexec")
    from flwr.supercore.superexec.executor import LaunchResult
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

    class Executor(SubprocessExecutor):
        def launch(self, spec: Any) -> LaunchResult:
            launch(spec)
            return LaunchResult.accepted()

        def reconcile(self) -> None:
            reconcile()

    return Executor()


def readmit_removed_keys() -> None:
    """Make Flower's SuperLink admit a key again after the removal of its node.

    Flower keeps the key of a removed node in its table, and then refuses this key for ever. The key of the removed row
    is overwritten; the row itself remains.
    """
    FLOWER.verify("readmission")
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.constant import NodeStatus
    from flwr.supercore.state.schema.linkstate_models import Node
    from sqlalchemy import update

    state: Any = SqlLinkState
    register = state.create_node

    def create_node(self: Any, owner_aid: str, owner_name: str, public_key: bytes, *args: Any, **settings: Any) -> Any:
        removed = (Node.public_key == public_key, Node.status == NodeStatus.UNREGISTERED)
        with self.session() as session:
            session.execute(update(Node).where(*removed).values(public_key=b"removed " + secrets.token_bytes(16)))
        return register(self, owner_aid, owner_name, public_key, *args, **settings)

    state.create_node = create_node


def run_superlink(
    accepts: Callable[[bytes], bool], limits: Callable[..., Any], *, max_connections: int, **settings: Any
) -> None:
    """Run Flower's SuperLink with the arguments of this process.

    Args:
        accepts: returns whether a request to the Control API with this token is accepted.
        limits: class of an ASGI application that handles each request first.
        max_connections: largest number of connections; further connections get status 503.
        settings: settings of ``limits``.
    """
    FLOWER.verify("superlink")
    plugin, module = control_authentication(accepts), _superlink_module()
    module.load_control_authn_plugin = lambda: plugin
    add_middleware(limits, **settings)
    readmit_removed_keys()
    options = {"http": http_protocol(), "ws": "none", "limit_concurrency": max_connections}
    run = partial(module.uvicorn.run, timeout_keep_alive=int(HEAD_TIMEOUT_S), **options)
    module.uvicorn = SimpleNamespace(run=run)
    module.flower_superlink()


def http_protocol(head_timeout_s: float = HEAD_TIMEOUT_S) -> Any:
    """Return uvicorn's protocol for HTTP, with limits of size and time for the head of a request.

    Uvicorn's other protocol (httptools) has no limit of size, and neither has a limit of time.

    Args:
        head_timeout_s: seconds in which the head of a request must arrive.
    """
    FLOWER.verify("superlink")
    from uvicorn.protocols.http.h11_impl import H11Protocol  # 64 KiB for a head

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(head_timeout_s, self._close_if_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _close_if_idle(self) -> None:
            cycle: Any = self.cycle  # the present request and its response; None before the first one
            if cycle is None or (cycle.response_complete and self.timeout_keep_alive_task is None):
                self.transport.abort()
            else:
                self._timer = self.loop.call_later(head_timeout_s, self._close_if_idle)

    return Protocol


def add_middleware(middleware: Callable[..., Any], **settings: Any) -> None:
    """Put an ASGI application in front of the other parts of Flower's SuperLink.

    Args:
        middleware: class of the application; its first argument is the next application.
        settings: further arguments.
    """
    FLOWER.verify("superlink")
    from flwr.superlink import main
    from starlette.middleware import Middleware

    others = main._get_middleware
    main._get_middleware = lambda: [Middleware(middleware, **settings), *map(_limit_to_paths, others())]


class ForPaths:
    """Apply a layer of an ASGI application to some paths only.

    Args:
        app: next application.
        layer: class of the layer.
        prefix: start of the paths.
        arguments: further arguments of the layer.
    """

    def __init__(self, app: Any, layer: Callable[..., Any], prefix: str, **arguments: Any) -> None:
        self.app, self.layer, self.prefix = app, layer(app, **arguments), prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request, in the interface of ASGI."""
        is_meant = scope["type"] == "http" and scope["path"].startswith(self.prefix)
        await (self.layer if is_meant else self.app)(scope, receive, send)


def _limit_to_paths(middleware: Any) -> Any:
    """Apply a middleware of Flower only to the paths to which it applies itself.

    Each of Flower's nine layers costs a message of a node half a millisecond, and six of them do nothing for it.
    """
    from starlette.middleware import Middleware

    limited: Any = ForPaths
    prefix = PATHS_OF_MIDDLEWARE.get(getattr(middleware.cls, "__name__", ""))
    return (
        middleware if prefix is None else Middleware(limited, layer=middleware.cls, prefix=prefix, **middleware.kwargs)
    )


@cache
def _verify_superlink() -> None:
    FLOWER.verify("superlink")


def signing_key(headers: Mapping[str, str]) -> bytes | None:
    """Return the public key (PEM) that has signed the time in the headers of a node's request.

    Flower checks this signature too, but only after it has read the body.

    Returns:
        The key, or None if the signature is not valid, or the time is not the present time.
    """
    _verify_superlink()
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        time = headers[TIMESTAMP_HEADER]
        age = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
        is_recent = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        is_valid = is_recent and verify_signature(bytes_to_public_key(key), time.encode("ascii"), signature)
    except (KeyError, ValueError, TypeError):
        return None
    return key if is_valid else None


def run_serverapp(arguments: Sequence[str], token: str) -> None:
    """Run Flower's process for a ServerApp; the token is not an argument of the process.

    Args:
        arguments: further arguments of ``flwr-serverapp``.
        token: token of the run.
    """
    FLOWER.verify("server app")
    from flwr.superlink.cli import flwr_serverapp

    sys.argv = ["flwr-serverapp", *arguments, "--token", token]  # this does not change the command line in /proc
    flwr_serverapp()


def serverapp_arguments(spec: Any) -> list[str]:
    """Return the arguments of ``flwr-serverapp`` for Flower's description of a run, without the token.

    Raises:
        ValueError: The description is not of a ServerApp.
    """
    FLOWER.verify("server app")
    from flwr.supercore.constant import TaskType

    if spec.task_type != TaskType.SERVER_APP:
        raise ValueError(f"this coordinator starts no programs of type {spec.task_type}")
    arguments = ["--runtime-api-address", spec.runtime_api_address, "--parent-pid", str(spec.parent_pid)]
    return [*arguments, "--root-certificates", str(spec.root_certificates_path)]


def control_authentication(accepts: Callable[[bytes], bool]) -> Any:
    """Return the plugin with which Flower's SuperLink checks the token of a request.

    Args:
        accepts: returns whether a request with this token is accepted.
    """
    FLOWER.verify("superlink")
    from flwr.common.constant import ACCESS_TOKEN_KEY
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

    class Authentication(NoOpControlAuthnPlugin):
        def validate_tokens_in_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> Any:
            token = dict(metadata).get(ACCESS_TOKEN_KEY, "")
            if not accepts(token.encode() if isinstance(token, str) else token):
                return False, None
            return super().validate_tokens_in_metadata(metadata)

    return Authentication()


def read_start_run(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return the app bundle and the run configuration in the body of a request that starts a run.

    Raises:
        ValueError: The body is malformed.
    """
    FLOWER.verify("control")
    from flwr.common.serde import user_config_from_proto
    from flwr.proto.control_pb2 import StartRunRequest

    request = _parse(StartRunRequest, body)
    return bytes(request.fab.content), dict(user_config_from_proto(request.override_config))


def write_start_run(fab: Any, config: Mapping[str, Any]) -> bytes:
    """Return the body of a request that starts a run of an app bundle with a run configuration."""
    FLOWER.verify("control")
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest

    request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
    return bytes(request.SerializeToString())


def read_started_run(body: bytes) -> int | None:
    """Return the id of a started run in the body of a response; None if no run was started."""
    FLOWER.verify("control")
    from flwr.proto.control_pb2 import StartRunResponse

    response = _parse(StartRunResponse, body)
    return int(response.run_id) if response.HasField("run_id") else None


def write_started_run(number: int) -> bytes:
    """Return the body of a response with the id of a run."""
    FLOWER.verify("control")
    from flwr.proto.control_pb2 import StartRunResponse

    return bytes(StartRunResponse(run_id=number).SerializeToString())


def change_run_configs(body: bytes, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> bytes:
    """Return the body of a list of runs with another run configuration of each run.

    Args:
        body: body of a response.
        change: function from the run configuration of a run to another one.
    """
    FLOWER.verify("control")
    from flwr.common.serde import user_config_from_proto, user_config_to_proto
    from flwr.proto.control_pb2 import ListRunsResponse

    response = _parse(ListRunsResponse, body)
    for run in response.run_dict.values():
        config = user_config_to_proto(dict(change(user_config_from_proto(run.override_config))))
        run.override_config.clear()
        for name, value in config.items():
            run.override_config[name].CopyFrom(value)
    return bytes(response.SerializeToString())


def read_run_id(body: bytes, kind: str) -> int:
    """Return the id of the run that a request names.

    Args:
        body: body of the request.
        kind: ``StopRun`` or ``StreamLogs``.

    Raises:
        ValueError: The body is malformed.
    """
    FLOWER.verify("control")
    from flwr.proto import control_pb2

    return int(_parse(getattr(control_pb2, f"{kind}Request"), body).run_id)


def _parse(kind: Any, body: bytes) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return kind.FromString(body)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the body is not a {kind.DESCRIPTOR.name}") from error


def _superlink_module() -> Any:
    """Return the module of the SuperLink's command; its package has a function of the same name."""
    from flwr.superlink.cli import flower_superlink  # noqa: F401  (loads the module)

    module: Any = sys.modules["flwr.superlink.cli.flower_superlink"]
    for name in ("load_control_authn_plugin", "flower_superlink"):
        if not hasattr(module, name):
            raise FLOWER.incompatible(f"flwr.superlink.cli.flower_superlink:{name}")
    return module


def app_bundle(files: Mapping[str, bytes]) -> tuple[bytes, Callable[[str], Any]]:
    """Build an app bundle (FAB).

    Args:
        files: path in the bundle -> content.

    Returns:
        The bundle as bytes, and a function that returns Flower's record of it for a digest.
    """
    FLOWER.verify("bundle")
    from flwr.cli.build import build_fab_from_files
    from flwr.supercore.fab import Fab

    content, _ = build_fab_from_files(dict(files))
    return content, lambda digest: Fab(digest, content, {})


class ControlClient:
    """Call the Control API of a SuperLink.

    Args:
        address: address of the API, ``host:port``.
        certificates: root certificates, PEM.
        token: token of each request.

    Raises:
        httpx.HTTPStatusError: from each method, if the SuperLink refuses the request.
        httpx.TransportError: from each method, if the SuperLink cannot be reached.
    """

    def __init__(self, address: str, *, certificates: bytes, token: str) -> None:
        FLOWER.verify("control")
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlearn"), _Bearer(token)],
        )
        _http_client_of(self._client).follow_redirects = False

    def start_run(self, fab: Any, config: Mapping[str, Any]) -> tuple[int | None, str]:
        """Start a run of an app bundle.

        Args:
            fab: Flower's record of the bundle, from `app_bundle`.
            config: run configuration, which overrides the configuration in the bundle.

        Returns:
            The id of the run and a note; the id is None if the SuperLink started no run.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest

        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        response = self._client.StartRun(request)
        return int(response.run_id) if response.HasField("run_id") else None, str(response.note)

    def stop_run(self, run_id: int) -> None:
        """Stop the run with this id."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._client.StopRun(StopRunRequest(run_id=run_id))

    def runs(self, run_id: int | None = None) -> Mapping[int, Any]:
        """Return the runs by id: one run if an id is given, else all runs."""
        from flwr.proto.control_pb2 import ListRunsRequest

        request = ListRunsRequest() if run_id is None else ListRunsRequest(run_id=run_id)
        return self._client.ListRuns(request).run_dict

    @staticmethod
    def last_heartbeat_of(node: Any) -> float:
        """Return the time of the last heartbeat of a node as a Unix time; 0 if it never connected."""
        from flwr.common.constant import HEARTBEAT_PATIENCE

        return max(0.0, float(node.online_until) - HEARTBEAT_PATIENCE * float(node.heartbeat_interval))

    @staticmethod
    def config_of(run: Any) -> Mapping[str, Any]:
        """Return the run configuration that was submitted with a run."""
        from flwr.common.serde import user_config_from_proto

        return user_config_from_proto(run.override_config)

    def logs(self, run_id: int, after: float) -> Iterator[Any]:
        """Yield the parts of the log of a run as they arrive.

        Args:
            run_id: id of the run.
            after: time stamp; earlier parts are skipped.
        """
        from flwr.proto.control_pb2 import StreamLogsRequest

        yield from self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=after))

    def nodes(self) -> Sequence[Any]:
        """Return all nodes that were ever registered, removed ones included."""
        from flwr.proto.control_pb2 import ListNodesRequest

        return self._client.ListNodes(ListNodesRequest()).nodes_info

    def register_node(self, name: str, public_key: bytes) -> None:
        """Register a node by name and public key."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister_node(self, node_id: int) -> None:
        """Remove the registration of a node."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def close(self) -> None:
        """Close the connection to the SuperLink."""
        self._client.close()


def _http_client_of(client: Any) -> Any:
    """Return the `httpx.Client` of a client of Flower."""
    if not hasattr(client, "_client"):
        raise FLOWER.incompatible(f"{type(client).__module__}:{type(client).__name__}._client")
    return client._client


class _Bearer:
    """Add a bearer token to each request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Add the token to the request, in the interface of Flower's interceptors."""
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


class FleetClient:
    """Receive messages from a SuperLink and send responses, as an admitted node.

    Flower's SuperNode does the same, starts a program for each message, and loses messages when a connection breaks.

    Args:
        address: address of the SuperLink, ``host:port``.
        certificates: root certificates, PEM.
        private_key: private key of the node, in the format of OpenSSH.

    Raises:
        httpx.HTTPStatusError: from each method, if the SuperLink refuses the request.
        httpx.TransportError: from each method, if the SuperLink cannot be reached.
        MissingParts: The parts of a message are not at the SuperLink.
    """

    def __init__(self, address: str, *, certificates: bytes, private_key: bytes) -> None:
        FLOWER.verify("fleet")
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        from fedlearn.flower.response_limits import limit_responses

        key: Any = load_ssh_private_key(private_key, None)
        self._public_key = key.public_key()
        self._client = FleetHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=certificates,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, self._public_key),
            ],
        )
        limit_responses(_http_client_of(self._client))

    def activate(self, heartbeat_interval_s: float) -> int:
        """Connect the node, and return its id. Flower refuses a node that is connected already."""
        from flwr.proto.fleet_pb2 import ActivateNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        key = public_key_to_bytes(self._public_key)
        request = ActivateNodeRequest(public_key=key, heartbeat_interval=heartbeat_interval_s)
        return int(self._client.ActivateNode(request).node_id)

    def deactivate(self, node_id: int) -> None:
        """End the connection of a node. Flower then forgets which messages this node has received."""
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def heartbeat(self, node_id: int, heartbeat_interval_s: float) -> bool:
        """Report that the node is connected. Return False if the SuperLink does not know the node."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
        from flwr.proto.node_pb2 import Node

        request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=heartbeat_interval_s)
        return bool(self._client.SendNodeHeartbeat(request).success)

    def pull(self, node_id: int) -> Any:
        """Return the next message with its parts, a `flwr.app.Message`; None if there is none.

        The sender may still upload the parts. So the time to wait for a part grows with their number.
        After a cut of the connection, the transfer continues with the part that was in progress.
        """
        from flwr.app import Message
        from flwr.common.serde import message_from_proto
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import (
            ObjectPullError,
            ObjectUnavailableError,
            pull_and_inflate_object_from_tree,
        )

        from fedlearn.flower.transfer import continue_after_cuts

        node = Node(node_id=node_id)
        response = self._client.PullMessages(PullMessagesRequest(node=node))
        if not response.messages_list:
            return None
        tree, run_id = response.message_object_trees[0], message_from_proto(response.messages_list[0]).metadata.run_id
        pull = make_pull_object_fn_protobuf(continue_after_cuts(self._client.PullObject), node, run_id)

        def confirm(object_id: str) -> None:
            request = ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=object_id)
            self._client.ConfirmMessageReceived(request)

        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                pull,
                confirm,
                return_type=Message,
                max_time=None,
                max_tries_per_object=MIN_PULLS_OF_PART + len(list(iterate_object_tree(tree))) // 2,
                backoff_cap=1.0,
            )
        except (ObjectPullError, ObjectUnavailableError) as error:
            raise MissingParts(str(error)) from error
        set_message_id(message, tree.object_id)
        return message

    def push(self, node_id: int, response: Any) -> None:
        """Send a response with its parts. A repeated call sends the missing parts."""
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, push_objects

        node, run_id = Node(node_id=node_id), response.metadata.run_id
        if not response.metadata.message_id:
            set_message_id(response, response.object_id)
        head = remove_content_from_message(response) if response.has_content() else response
        with no_object_id_recompute():
            pushed = self._client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[message_to_proto(head)],
                    message_object_trees=[get_object_tree(response)],
                    clientapp_runtime_list=[0.0],
                )
            )
            push = make_push_object_fn_protobuf(self._client.PushObject, node, run_id, pushed.session_id)
            try:
                push_objects(get_all_nested_objects(response), push, object_ids_to_push=set(pushed.objects_to_push))
            except ObjectPushError as error:
                raise MissingParts(str(error)) from error

    def close(self) -> None:
        """Close the connection to the SuperLink."""
        self._client.close()


class MissingParts(Exception):
    """Report a message whose parts are not at the SuperLink."""


def identify_as_node(message: Any) -> None:
    """Allow this process to create responses to a message."""
    FLOWER.verify("identity")
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
        message.metadata.run_id,
        message.metadata.dst_node_id,
        1,
    )
