"""Collect the numbers of a coordinator for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from fedlearn.deploy.certificates import expiry
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.key_files import CERTIFICATE, KeysError
from fedlearn.deploy.metrics import Sample, common_samples
from fedlearn.web.run_views import RUNNING, STARTING, RunView
from fedlearn.web.sources import Snapshot

STATES = ("queued", "starting", "running", "interrupted", "done", "early stopped", "stopped", "failed")
MAX_FINISHED = 20  # finished runs with numbers of their own, the newest first
NODE_STATES = ("online", "offline", "registered")


def coordinator_samples(read: Callable[[], Snapshot], *, keys: Path, state: Path, runs: Path) -> Iterator[Sample]:
    """Yield the numbers of a coordinator.

    Args:
        read: function that returns nodes and runs.
        keys: folder with the coordinator's keys.
        state: state folder of the coordinator.
        runs: folder of the run folders.
    """
    yield from common_samples(runs=runs, state=state)
    yield _certificate(keys)
    snapshot = read()
    yield Sample("up", "1 if the coordinator answers, else 0.", float(not snapshot.problem))
    nodes = snapshot.nodes or []
    counts = Counter(node.state for node in nodes)
    for name in dict.fromkeys((*NODE_STATES, *counts)):
        yield Sample("nodes", "Admitted nodes by state.", float(counts[name]), (("state", name),))
    for node in nodes:
        online = float(node.state == "online")
        yield Sample("node_online", "1 if a node is online, else 0.", online, (("node", node.name),))
        info = (("node", node.name), ("version", node.version), ("framework", node.framework))
        yield Sample("node_info", "Version and framework of a node in its last run.", float(bool(node.version)), info)
        changed = Sample("node_since_timestamp_seconds", "Last change of a node.", _timestamp(node.since))
        yield Sample(changed.name, changed.help, changed.value, (("node", node.name),))
    states = Counter(run.state for run in snapshot.runs)
    for name in dict.fromkeys((*STATES, *states)):
        yield Sample("runs", "Runs by state, of the newest 200.", float(states[name]), (("state", name),))
    active = [run for run in snapshot.runs if run.state in (RUNNING, STARTING)]
    finished = [run for run in snapshot.runs if run.state not in (RUNNING, STARTING)]
    for run in (*active, *finished[:MAX_FINISHED]):
        yield from _run_samples(run)


def _run_samples(run: RunView) -> Iterator[Sample]:
    label = (("run", run.key),)
    yield Sample("run_rounds_total", "Completed rounds of a run.", float(run.round), label, "counter")
    yield Sample("run_planned_rounds", "Planned rounds of a run.", float(run.rounds) or None, label)
    yield Sample("run_round_seconds", "Duration of the last round of a run.", run.seconds, label)
    yield Sample("run_last_round_timestamp_seconds", "End of the last round of a run.", _timestamp(run.changed), label)
    text = "Failures of clients in a run."
    yield Sample("run_client_failures_total", text, float(run.num_failures), label, "counter")
    for direction, value in (("from_clients", run.bytes_up), ("to_clients", run.bytes_down)):
        labels = (*label, ("direction", direction))
        yield Sample("run_bytes_total", "Payload of a run in bytes.", value, labels, "counter")
    yield Sample("run_epsilon", "Privacy loss of a run so far.", run.epsilon, label)
    yield Sample("run_epsilon_limit", "Budget of the privacy loss of a run.", run.epsilon_limit, label)


def _certificate(keys: Path) -> Sample:
    text = "End of the validity of the server certificate."
    try:
        return Sample("certificate_expiry_timestamp_seconds", text, expiry(keys / CERTIFICATE).timestamp())
    except (KeysError, ConnectionProblem):
        return Sample("certificate_expiry_timestamp_seconds", text, None)


def _timestamp(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except ValueError:
        return None
