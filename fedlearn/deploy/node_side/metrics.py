"""Serve the numbers of a node for Prometheus on loopback.

The labels are names of parts, kinds of requests and codes of refusals. No label or number depends on the data.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlearn.deploy.audit_log import AUDIT_FILE
from fedlearn.deploy.metrics import Sample, common_samples, format_metrics
from fedlearn.deploy.node_side.messenger_state import read_problem
from fedlearn.deploy.processes import Child
from fedlearn.protocol.messages import RequestKind
from fedlearn.protocol.refusals import RefusalCode
from fedlearn.web.app import build_metrics_app
from fedlearn.web.security import accepted_hosts
from fedlearn.web.server import LOOPBACK, Listener, listen, serve

PARTS = ("messenger", "coordinator", "trainer")  # the path from the coordinator to the trainer
KINDS, CODES = frozenset(map(str, RequestKind)), frozenset(map(str, RefusalCode))
OTHER = "other"


@dataclass
class AuditCounts:
    """Counts of the lines in a node's audit log, read incrementally.

    Args:
        folder: folder of the log.

    Attributes:
        requests: kind -> number of answered requests.
        refusals: code -> number of refusals.
        epsilon: largest privacy loss of a client so far; None without a ledger.
        last: time of the last request in seconds since 1970; None before the first one.
    """

    folder: Path
    requests: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    epsilon: float | None = None
    last: float | None = None
    _size: int = 0

    def update(self) -> None:
        """Read the lines that are new since the last call."""
        with suppress(OSError), (self.folder / AUDIT_FILE).open("rb") as file:
            file.seek(self._size)
            lines = file.read().split(b"\n")[:-1]
            self._size += sum(len(line) + 1 for line in lines)
            for line in lines:
                with suppress(ValueError, TypeError, AttributeError):
                    self._add(json.loads(line))

    def _add(self, line: dict[str, Any]) -> None:
        if line.get("event") == "request":
            self.requests[_known(line.get("kind"), KINDS)] += 1
        elif line.get("event") == "request.refused":
            self.refusals[_known(line.get("code"), CODES)] += 1
        else:
            return
        epsilon = line.get("epsilon")
        self.epsilon = float(epsilon) if isinstance(epsilon, int | float) else self.epsilon
        self.last = datetime.fromisoformat(line["time"]).timestamp()


def _known(name: Any, names: frozenset[str]) -> str:
    return name if name in names else OTHER


def node_samples(state: Path, children: Sequence[Child], counts: AuditCounts | None) -> Iterator[Sample]:
    """Yield the numbers of a node.

    Args:
        state: state folder of the node.
        children: processes of the node.
        counts: counts of the trainer's audit log; None if another user runs the trainer.
    """
    yield from common_samples(state=state)
    for part in PARTS:
        works = float(not read_problem(state, part))
        yield Sample("part_works", "1 if a part of the path to the trainer works, else 0.", works, (("part", part),))
    for child in children:
        label = (("process", child.name.removeprefix("the ")),)
        yield Sample("process_up", "1 if a process of the node runs, else 0.", float(child.exit_code is None), label)
    if counts is None:
        return
    counts.update()
    for kind in sorted(KINDS | counts.requests.keys()):
        number = float(counts.requests[kind])
        yield Sample("requests_total", "Answered requests by kind.", number, (("kind", kind),), "counter")
    for code in sorted(counts.refusals):
        number = float(counts.refusals[code])
        yield Sample("refusals_total", "Refused requests by code.", number, (("code", code),), "counter")
    yield Sample("epsilon", "Largest privacy loss of a client of this node, over all runs.", counts.epsilon)
    yield Sample("last_request_timestamp_seconds", "Time of the last request.", counts.last)


def start_metrics(port: int, state: Path, children: Sequence[Child], client_states: Path | None) -> str:
    """Serve the metrics in a thread that ends with this process, and return the line that names their address.

    Args:
        port: port on loopback; 0 takes a free port.
        state: state folder of the node.
        children: processes of the node.
        client_states: folder with the trainer's audit log; None if another user runs the trainer.

    Raises:
        PortError: the port cannot be used.
        MissingExtra: the client library of Prometheus is not installed.
    """
    counts, lock = AuditCounts(client_states) if client_states else None, threading.Lock()

    def collect() -> list[Sample]:
        with lock:
            return list(node_samples(state, children, counts))

    socket = listen(LOOPBACK, port, "--metrics")
    port = socket.getsockname()[1]
    app = build_metrics_app(format_metrics(collect), hosts=accepted_hosts(("localhost", LOOPBACK), port))
    arguments = ([Listener(app=app, socket=socket)], lambda: None)
    threading.Thread(target=_serve, args=arguments, name="metrics", daemon=True).start()
    return f"metrics   http://{LOOPBACK}:{port}/metrics"


def _serve(*arguments: Any) -> None:
    with suppress(KeyboardInterrupt, asyncio.CancelledError):
        serve(*arguments)
