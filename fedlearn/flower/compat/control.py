"""Read and write requests to the Control API of a SuperLink, and call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedlearn.flower.compat.names import FLOWER, http_client_of


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
        http_client_of(self._client).follow_redirects = False

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


class _Bearer:
    """Add a bearer token to each request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Add the token to the request, in the interface of Flower's interceptors."""
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


def _parse(kind: Any, body: bytes) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return kind.FromString(body)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the body is not a {kind.DESCRIPTOR.name}") from error
