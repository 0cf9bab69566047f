"""How submit and coordinator talk to Flower's Control API: TLS, the operator's token, and errors with a cause."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlearn.deploy.keys import CA, TOKEN
from fedlearn.errors import FedlearnError

SECONDS = 15.0  # for a connection and for each request


class ConnectionProblem(FedlearnError):
    """The coordinator cannot be reached, is not who it says, or does not know us."""


@dataclass(frozen=True)
class Status:
    """Where a run stands: ``pending``, ``starting``, ``running`` or ``finished``; then how, and what it said."""

    status: str
    how: str = ""
    details: str = ""

    @property
    def finished(self) -> bool:
        """Whether it is over."""
        return self.status == "finished"


class Control:
    """A connection to the coordinator's Control API.

    Args:
        address: ``host:port``.
        keys: a folder with the root certificate and the operator's token.

    Raises:
        ConnectionProblem: from each method, if it cannot be done; the message says why and what to try.
    """

    def __init__(self, address: str, keys: Path) -> None:
        self.address = address
        token = _text(keys / TOKEN)
        self._client = ControlHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=_text(keys / CA).encode(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlearn"), _Bearer(token)],
        )

    def start(self, fab: Fab, config: Mapping[str, Any]) -> int:
        """Start a run of an app bundle; its id."""
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        with self._explained():
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise ConnectionProblem(f"{self.address} did not start the run: {response.note}")
        return int(response.run_id)

    def stop(self, run_id: int) -> None:
        """Stop a run where it is."""
        with self._explained():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def status(self, run_id: int) -> Status:
        """Where a run stands."""
        with self._explained():
            runs = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in runs:
            raise ConnectionProblem(f"{self.address} does not know run {run_id}: has its database been replaced?")
        found = runs[run_id].status
        return Status(found.status, found.sub_status, found.details)

    def going_on(self) -> list[int]:
        """The runs that have begun and not ended."""
        with self._explained():
            runs = self._client.ListRuns(ListRunsRequest()).run_dict
        return [run_id for run_id, run in runs.items() if run.status.status in ("starting", "running")]

    def log(self, run_id: int, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """What a run prints, as it comes, each piece with its time; ends when the run does."""
        with self._explained():
            for piece in self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=after)):
                yield piece.log_output, piece.latest_timestamp

    def nodes(self) -> dict[bytes, int]:
        """The nodes that may join: public key (PEM) to node id."""
        with self._explained():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.node_id for node in found if node.status != "unregistered"}

    def admit(self, name: str, public_key: bytes) -> None:
        """Let a node join."""
        with self._explained():
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def expel(self, node_id: int) -> None:
        """Let a node join no more."""
        with self._explained():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise ConnectionProblem(_refusal(self.address, error.response)) from error
        except httpx.TransportError as error:
            raise ConnectionProblem(explain(self.address, error)) from error


class _Bearer:
    """Adds the operator's token to each request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        """See flwr.supercore.protobuf.client.ProtobufClientInterceptor."""
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


def reach(address: str, root: Path, *, seconds: float = SECONDS) -> None:
    """Connect with TLS and hang up.

    Args:
        address: ``host:port``.
        root: the certificate that the server's must be signed with.
        seconds: for the attempt.

    Raises:
        ConnectionProblem: nobody answers, or who does is not the coordinator.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConnectionProblem(f"{address} is not an address\n  expected  host:port\n  try       localhost:8000")
    host = host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=_text(root))
        with (
            socket.create_connection((host, int(port)), timeout=seconds) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            pass
    except OSError as error:
        raise ConnectionProblem(explain(address, error)) from error


CAUSES = (
    ("expired", "its certificate has expired", "python -m fedlearn.deploy.keys renew FOLDER, then restart it"),
    ("not yet valid", "its certificate is not valid yet", "set this machine's clock"),
    ("mismatch", "its certificate is for other names", "keys renew FOLDER --host NAME with the name used here"),
    ("certificate verify failed", "its certificate is signed by another authority", "the ca.crt of this federation"),
    ("wrong_version_number", "it does not speak TLS", "the port that the coordinator printed"),
    ("wrong version number", "it does not speak TLS", "the port that the coordinator printed"),
    ("record layer failure", "it does not speak TLS", "the port that the coordinator printed"),
    ("refused", "nobody listens there", "python -m fedlearn.deploy.coordinator, or another address"),
    ("timed out", "it does not answer", "another address, or a firewall that lets this port through"),
    ("name or service not known", "there is no such host", "another address"),
    ("disconnected", "it hung up", "again in a moment"),
)


def explain(address: str, error: Exception) -> str:
    """Why a connection failed, and what to try."""
    told = f"{error} {error.__cause__ or ''}".lower()
    why, fix = next(((why, fix) for sign, why, fix in CAUSES if sign in told), (str(error) or type(error).__name__, ""))
    return f"no connection to {address}: {why}" + (f"\n  try       {fix}" if fix else "")


def _refusal(address: str, response: httpx.Response) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{address} does not accept this operator's token\n  try       --keys with the folder keys/operator"
    try:
        said = json.loads(response.text)
        text = said.get("public_details") or said.get("message") or said.get("detail") or response.text
    except (ValueError, AttributeError):
        text = response.text
    return f"{address} refuses: {text} (HTTP {response.status_code})"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        fix = "a folder that python -m fedlearn.deploy.keys made"
        raise ConnectionProblem(f"{path} cannot be read: {error.strerror}\n  try       {fix}") from error
