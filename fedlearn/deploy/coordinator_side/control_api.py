"""How submit and coordinator talk to Flower's Control API: TLS, the operator's token, and errors with a cause."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedlearn.deploy.connectivity import ConnectionProblem, explain, read_key_file
from fedlearn.deploy.keys import CA, TOKEN
from fedlearn.flower.compat import ControlClient


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands: ``pending``, ``starting``, ``running`` or ``finished``; then how, and what it said."""

    status: str
    sub_status: str = ""
    details: str = ""

    @property
    def finished(self) -> bool:
        """Whether it is over."""
        return self.status == "finished"


class CoordinatorClient:
    """A connection to the coordinator's Control API.

    Args:
        address: ``host:port``.
        keys: a folder with the root certificate and the operator's token.
        token: another one.

    Raises:
        ConnectionProblem: from each method, if it cannot be done; the message says why and what to try.
    """

    def __init__(self, address: str, keys: Path, *, token: str | None = None) -> None:
        self.address = address
        token = token or read_key_file(keys / TOKEN)
        self._client = ControlClient(address, certificates=read_key_file(keys / CA).encode(), token=token)

    def start(self, fab: Any, config: Mapping[str, Any]) -> int:
        """Start a run of an app bundle; its id."""
        with self._explained():
            run_id, note = self._client.start_run(fab, config)
        if run_id is None:
            raise ConnectionProblem(f"{self.address} did not start the run: {note}")
        return run_id

    def stop(self, run_id: int) -> None:
        """Stop a run where it is."""
        with self._explained():
            self._client.stop_run(run_id)

    def status(self, run_id: int) -> RunStatus:
        """Where a run stands."""
        with self._explained():
            runs = self._client.runs(run_id)
        if run_id not in runs:
            raise ConnectionProblem(f"{self.address} does not know run {run_id}: has its database been replaced?")
        found = runs[run_id].status
        return RunStatus(found.status, found.sub_status, found.details)

    def list_running(self) -> list[int]:
        """The runs that have begun and not ended."""
        with self._explained():
            runs = self._client.runs()
        return [run_id for run_id, run in runs.items() if run.status.status in ("starting", "running")]

    def log(self, run_id: int, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """What a run prints, as it comes, each piece with its time; ends when the run does."""
        with self._explained():
            for piece in self._client.logs(run_id, after):
                yield piece.log_output, piece.latest_timestamp

    def nodes(self) -> dict[bytes, int]:
        """The nodes that may join: public key (PEM) to node id."""
        with self._explained():
            found = self._client.nodes()
        return {node.public_key: node.node_id for node in found if node.status != "unregistered"}

    def register_node(self, name: str, public_key: bytes) -> None:
        """Let a node join."""
        with self._explained():
            self._client.register_node(name, public_key)

    def unregister_node(self, node_id: int) -> None:
        """Let a node join no more."""
        with self._explained():
            self._client.unregister_node(node_id)

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


def _refusal(address: str, response: httpx.Response) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{address} does not accept this operator's token\n  try       --keys with the folder keys/operator"
    try:
        said = json.loads(response.text)
        text = said.get("public_details") or said.get("message") or said.get("detail") or response.text
    except (ValueError, AttributeError):
        text = response.text
    return f"{address} refuses: {text} (HTTP {response.status_code})"
