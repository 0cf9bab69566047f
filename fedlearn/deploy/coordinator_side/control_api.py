"""Call Flower's Control API with TLS and the token of a person. Each error names its cause."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from fedlearn.core.command_line import DONE
from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.connectivity import ConnectionProblem, explained_errors, parse_address, read_key_file
from fedlearn.deploy.coordinator_side.app_bundle import NAME_KEY, PERSON_KEY, REQUEST_KEY, parse_exit_code
from fedlearn.deploy.coordinator_side.run_requests import read_request
from fedlearn.deploy.key_files import CA, TOKEN
from fedlearn.flower.compat.control import ControlClient


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        status: ``pending``, ``starting``, ``running`` or ``finished``.
        sub_status: outcome of a finished run, e.g. ``completed``, ``failed`` or ``stopped``; empty before the end.
        details: text of the outcome; may be empty.
        finished_at: time of the end, as a Unix time; 0 before the end.
    """

    status: str
    sub_status: str = ""
    details: str = ""
    finished_at: float = 0.0

    @property
    def finished(self) -> bool:
        """True if the run has ended."""
        return self.status == "finished"


@dataclass(frozen=True)
class NodeState:
    """The state of an admitted node.

    Attributes:
        name: name of its key.
        id: Flower's id of the node.
        state: ``online``; ``offline``, if its heartbeats stopped; or ``registered``, if it never connected.
        since: time of its last connection or of its end, UTC, in ISO 8601; empty if it never connected.
        last_heartbeat: time of its last heartbeat, or of its end if it is offline; empty if it never connected.
    """

    name: str
    id: int
    state: str
    since: str
    last_heartbeat: str = ""


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        id: Flower's id of the run.
        status: ``pending``, ``starting``, ``running`` or ``finished``.
        outcome: outcome of a finished run: ``completed``, ``failed`` or ``stopped``; empty before the end.
        exit_code: exit code of a finished run; None for an interrupted run and before the end.
        started: time of its start or submission, UTC, in ISO 8601.
        finished: time of its end; empty before the end.
        folder: run folder at the coordinator, as submitted.
        experiment: scenario and strategy; empty for a resumed run, whose folder has them.
        name: name of the run, equal in all its parts, at the nodes and in the audit logs.
        person: name of the person who submitted it.
    """

    id: int
    status: str
    outcome: str
    exit_code: int | None
    started: str
    finished: str
    folder: str
    experiment: str
    name: str = ""
    person: str = ""


class CoordinatorClient:
    """A connection to the coordinator's Control API.

    Args:
        address: address of the coordinator, ``host:port``.
        keys: folder with the root certificate and the token of a person.
        token: another token; None: the token in ``keys``.

    Raises:
        ConnectionProblem: A call of a method failed; the message has the cause and one thing to try.
    """

    def __init__(self, address: str, keys: Path, *, token: str | None = None) -> None:
        parse_address(address)
        self.address = address
        token = token or read_key_file(keys / TOKEN)
        self._client = ControlClient(address, certificates=read_key_file(keys / CA).encode(), token=token)

    def start(self, fab: Any, config: Mapping[str, Any]) -> int:
        """Start a run of an app bundle, and return its id."""
        with explained_errors(self.address):
            run_id, note = self._client.start_run(fab, config)
        if run_id is None:
            raise ConnectionProblem(f"{self.address} did not start the run: {plain_line(note)}")
        return run_id

    def stop(self, run_id: int) -> None:
        """Stop a run at once, in the middle of a round."""
        with explained_errors(self.address):
            self._client.stop_run(run_id)

    def status(self, run_id: int) -> RunStatus:
        """Return the present status of a run."""
        with explained_errors(self.address):
            try:
                runs = self._client.runs(run_id)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.NOT_FOUND:
                    raise
                runs = {}
        if run_id not in runs:
            raise ConnectionProblem(
                f"{self.address} does not know run {run_id}\n  expected  the id of a run in its database\n"
                "  try       python -m fedlearn.deploy.status"
            )
        return _status_of(runs[run_id])

    def list_running(self) -> list[int]:
        """Return the ids of the runs that have started and not ended."""
        with explained_errors(self.address):
            runs = self._client.runs()
        return [run_id for run_id, run in runs.items() if run.status.status in ("starting", "running")]

    def configs(self) -> dict[int, tuple[RunStatus, Mapping[str, Any]]]:
        """Return status and run configuration of all runs, by id."""
        with explained_errors(self.address):
            runs = self._client.runs()
        return {run_id: (_status_of(run), self._client.config_of(run)) for run_id, run in runs.items()}

    def successor(self, run_id: int) -> int | None:
        """Return the id of the run that continues an interrupted run; None if there is none."""
        for id, (_, config) in self.configs().items():
            if read_request(str(config.get(REQUEST_KEY))).get("continues") == run_id:
                return id
        return None

    def log(self, run_id: int, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """Yield the output of a run in pieces, each with its timestamp, until the run ends.

        Args:
            run_id: id of the run.
            after: timestamp; earlier pieces are left out.
        """
        with explained_errors(self.address):
            for piece in self._client.logs(run_id, after):
                yield piece.log_output, piece.latest_timestamp

    def nodes(self) -> dict[bytes, int]:
        """Return the admitted nodes: public key (PEM) -> node id."""
        with explained_errors(self.address):
            nodes = self._client.nodes()
        return {node.public_key: node.node_id for node in nodes if node.status != "unregistered"}

    def node_states(self) -> list[NodeState]:
        """Return the states of the admitted nodes, in order of their names."""
        with explained_errors(self.address):
            nodes = [node for node in self._client.nodes() if node.status != "unregistered"]
        states = [
            NodeState(
                name=plain_line(node.name),
                id=int(node.node_id),
                state=str(node.status),
                since=str(node.last_activated_at if node.status == "online" else node.last_deactivated_at),
                last_heartbeat=self._last_heartbeat(node),
            )
            for node in nodes
        ]
        return sorted(states, key=lambda state: state.name)

    def _last_heartbeat(self, node: Any) -> str:
        if node.status != "online":
            return str(node.last_deactivated_at)
        # a node names the interval of its heartbeats, so the result is bounded
        seen = min(time.time(), self._client.last_heartbeat_of(node))
        return datetime.fromtimestamp(seen, UTC).isoformat(timespec="seconds")

    def run_states(self) -> list[RunState]:
        """Return the states of all runs, the newest first."""
        with explained_errors(self.address):
            runs = self._client.runs()
        states = [_run_state(run_id, run, self._client.config_of(run)) for run_id, run in runs.items()]
        return _with_names(sorted(states, key=lambda state: state.started, reverse=True))

    def register_node(self, name: str, public_key: bytes) -> None:
        """Admit a node with its public key (PEM)."""
        with explained_errors(self.address):
            self._client.register_node(name, public_key)

    def unregister_node(self, node_id: int) -> None:
        """Remove a node from the admitted nodes."""
        with explained_errors(self.address):
            self._client.unregister_node(node_id)

    def close(self) -> None:
        """Close the connection to the coordinator."""
        self._client.close()


def parse_end(status: RunStatus) -> int | None:
    """Return the exit code of a run; None for a run that was interrupted."""
    return DONE if status.sub_status == "completed" else parse_exit_code(status.details)


def _status_of(run: Any) -> RunStatus:
    status = run.status
    details = plain_line(status.details, max_length=2000)
    finished_at = datetime.fromisoformat(run.finished_at).timestamp() if run.finished_at else 0.0
    return RunStatus(status.status, status.sub_status, details, finished_at)


def _run_state(run_id: int, run: Any, config: Mapping[str, Any]) -> RunState:
    """Return the state of a run."""
    request, status = read_request(str(config.get(REQUEST_KEY))), run.status
    settings = _mapping(request.get("settings"))
    names = [str(_mapping(settings.get(group)).get("name", "")) for group in ("scenario", "strategy")]
    is_done = status.sub_status == "completed"
    return RunState(
        id=int(run_id),
        status=str(status.status),
        outcome=str(status.sub_status),
        exit_code=DONE if is_done else parse_exit_code(status.details),
        started=str(run.running_at or run.pending_at),
        finished=str(run.finished_at),
        folder=plain_line(str(request.get("folder", "")), max_length=1000),
        experiment=plain_line(" · ".join(filter(None, names))),
        name=plain_line(str(config.get(NAME_KEY, ""))),
        person=plain_line(str(config.get(PERSON_KEY, ""))),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping in a request; empty for another value, which a submitter may have sent."""
    return value if isinstance(value, dict) else {}


def _with_names(runs: Sequence[RunState]) -> list[RunState]:
    """Return the runs, each resumed run with name and experiment of the newest earlier run of its folder."""
    named: dict[str, RunState] = {}
    for run in reversed(runs):
        if run.name:
            named[run.folder] = run
    first = {run.id: named.get(run.folder, run) for run in runs}
    return [
        run if run.name else replace(run, name=first[run.id].name, experiment=first[run.id].experiment) for run in runs
    ]
