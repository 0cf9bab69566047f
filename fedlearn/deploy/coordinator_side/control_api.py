"""Call Flower's Control API with TLS and the operator's token. Each error names its cause."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.connectivity import ConnectionProblem, explain, read_key_file
from fedlearn.deploy.keys import CA, TOKEN
from fedlearn.flower.compat import ControlClient


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        status: ``pending``, ``starting``, ``running`` or ``finished``.
        sub_status: outcome of a finished run, e.g. ``completed``, ``failed`` or ``stopped``; empty before the end.
        details: text of the outcome; may be empty.
    """

    status: str
    sub_status: str = ""
    details: str = ""

    @property
    def finished(self) -> bool:
        """True if the run has ended."""
        return self.status == "finished"


class CoordinatorClient:
    """A connection to the coordinator's Control API.

    Args:
        address: address of the coordinator, ``host:port``.
        keys: folder with the root certificate and the operator's token.
        token: token instead of the operator's token; None: the token in ``keys``.

    Raises:
        ConnectionProblem: A call of a method failed; the message has the cause and one thing to try.
    """

    def __init__(self, address: str, keys: Path, *, token: str | None = None) -> None:
        self.address = address
        token = token or read_key_file(keys / TOKEN)
        self._client = ControlClient(address, certificates=read_key_file(keys / CA).encode(), token=token)

    def start(self, fab: Any, config: Mapping[str, Any]) -> int:
        """Start a run of an app bundle, and return its id."""
        with self._explain_errors():
            run_id, note = self._client.start_run(fab, config)
        if run_id is None:
            raise ConnectionProblem(f"{self.address} did not start the run: {plain_line(note)}")
        return run_id

    def stop(self, run_id: int) -> None:
        """Stop a run at once, in the middle of a round."""
        with self._explain_errors():
            self._client.stop_run(run_id)

    def status(self, run_id: int) -> RunStatus:
        """Return the present status of a run."""
        with self._explain_errors():
            runs = self._client.runs(run_id)
        if run_id not in runs:
            raise ConnectionProblem(
                f"{self.address} does not know run {run_id}\n  expected  the id of a run in its database\n"
                "  advice    the id that fedlearn.deploy.submit printed"
            )
        status = runs[run_id].status
        return RunStatus(status.status, status.sub_status, plain_line(status.details, max_length=2000))

    def list_running(self) -> list[int]:
        """Return the ids of the runs that have started and not ended."""
        with self._explain_errors():
            runs = self._client.runs()
        return [run_id for run_id, run in runs.items() if run.status.status in ("starting", "running")]

    def log(self, run_id: int, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """Yield the output of a run in pieces, each with its timestamp, until the run ends.

        Args:
            run_id: id of the run.
            after: timestamp; earlier pieces are left out.
        """
        with self._explain_errors():
            for piece in self._client.logs(run_id, after):
                yield piece.log_output, piece.latest_timestamp

    def nodes(self) -> dict[bytes, int]:
        """Return the admitted nodes: public key (PEM) -> node id."""
        with self._explain_errors():
            nodes = self._client.nodes()
        return {node.public_key: node.node_id for node in nodes if node.status != "unregistered"}

    def register_node(self, name: str, public_key: bytes) -> None:
        """Admit a node with its public key (PEM)."""
        with self._explain_errors():
            self._client.register_node(name, public_key)

    def unregister_node(self, node_id: int) -> None:
        """Remove a node from the admitted nodes."""
        with self._explain_errors():
            self._client.unregister_node(node_id)

    def close(self) -> None:
        """Close the connection to the coordinator."""
        self._client.close()

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise ConnectionProblem(_describe_refusal(self.address, error.response)) from error
        except httpx.TransportError as error:
            raise ConnectionProblem(explain(self.address, error)) from error


def _describe_refusal(address: str, response: httpx.Response) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        problem, expected = f"{address} does not accept this operator's token", "--keys with the operator's folder"
        return f"{problem}\n  expected  {expected}\n  try       --keys keys/operator"
    try:
        content = json.loads(response.text)
        text = content.get("public_details") or content.get("message") or content.get("detail") or response.text
    except (ValueError, AttributeError):
        text = response.text
    return f"{address} refuses the call: {plain_line(str(text))} (HTTP {response.status_code})"
