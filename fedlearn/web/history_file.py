"""Follow ``metrics.jsonl`` of a run: read only the lines that are new since the last call."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.callbacks.run_history import METRICS_FILE
from fedlearn.web.safe_files import as_count, as_number, as_object, as_text, open_inside, parse_object

MAX_LINE_BYTES = 4 << 20
MAX_READ_BYTES = 64 << 20  # bytes that one call reads
MAX_FAILURES = 20  # newest failures that are kept
MAX_METRICS = 24  # metrics of a line that are kept


@dataclass(frozen=True, kw_only=True)
class RoundPoint:
    """The numbers of one round. A missing value is None.

    Attributes:
        number: number of the round.
        time: end of the round, UTC, in ISO 8601.
        values: curve -> value: ``test.METRIC``, ``train.METRIC``, ``mean.METRIC`` and ``worst.METRIC`` over clients,
            ``epsilon``, ``seconds``, ``updates``, ``failures``, ``bytes_up``, ``bytes_down``.
    """

    number: int
    time: str
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class ClientFailure:
    """A failure of a client in a round.

    Attributes:
        round: number of the round.
        client: id of the client.
        stage: stage of the failure, see `fedlearn.core.records.FailureStage`.
        reason: cause, one line.
    """

    round: int
    client: str
    stage: str
    reason: str


@dataclass
class HistoryFile:
    """The history of a run, read incrementally.

    Args:
        root: folder that all files must be in.
        folder: run folder.

    Attributes:
        points: one point per round, ascending.
        failures: newest failures, the newest last.
        num_failures: number of all failures.
        bytes_up: bytes from the clients in all rounds; ``bytes_down``: bytes to the clients.
        lower_is_better: metrics of the user whose low values are good.
        size: bytes of all lines that were read.
    """

    root: Path
    folder: Path
    points: list[RoundPoint] = field(default_factory=list)
    failures: list[ClientFailure] = field(default_factory=list)
    num_failures: int = 0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    lower_is_better: tuple[str, ...] = ()
    size: int = 0
    _inode: int = 0

    def update(self) -> None:
        """Read the new complete lines. A file that a resumed run has replaced is read from its start."""
        descriptor = open_inside(self.root, self.folder / METRICS_FILE)
        if descriptor is None:
            return
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if status.st_ino != self._inode or status.st_size < self.size:
                self.points.clear()
                self.failures.clear()
                self.num_failures = self.size = 0
                self.bytes_up = self.bytes_down = 0.0
                self._inode = status.st_ino
            file.seek(self.size)
            text = file.read(MAX_READ_BYTES)
        lines = text.split(b"\n")[:-1]  # a crash may leave an incomplete last line
        self.size += sum(len(line) + 1 for line in lines)
        for line in lines:
            if len(line) <= MAX_LINE_BYTES:
                self._add(parse_object(line))

    def _add(self, line: Mapping[str, Any]) -> None:
        number = as_count(line.get("round"))
        if not number:
            return
        listed = line.get("failures")
        failures = [as_object(each) for each in listed] if isinstance(listed, list) else []
        self.num_failures += len(failures)
        self.failures += [_failure(number, each) for each in failures[-MAX_FAILURES:]]
        del self.failures[:-MAX_FAILURES]
        lower = line.get("lower_is_better")
        self.lower_is_better = tuple(map(as_text, lower)) if isinstance(lower, list) else self.lower_is_better
        self.bytes_up += as_number(line.get("bytes_up")) or 0.0
        self.bytes_down += as_number(line.get("bytes_down")) or 0.0
        self.points.append(RoundPoint(number=number, time=as_text(line.get("time")), values=_values(line, failures)))


def _failure(number: int, entry: Mapping[str, Any]) -> ClientFailure:
    client = entry.get("client")
    name = str(client) if type(client) is int else as_text(client)
    return ClientFailure(number, name[:100], as_text(entry.get("stage")), as_text(entry.get("reason")))


def _values(line: Mapping[str, Any], failures: list[Any]) -> dict[str, float | None]:
    values = {f"test.{name}": as_number(value) for name, value in _first(line.get("test"))}
    values |= {f"train.{name}": as_number(value) for name, value in _first(line.get("train"))}
    for name, statistics in _first(line.get("clients")):
        values[f"mean.{name}"] = as_number(as_object(statistics).get("mean"))
        values[f"worst.{name}"] = as_number(as_object(statistics).get("worst10"))
    values |= {name: as_number(line.get(name)) for name in ("epsilon", "seconds", "bytes_up", "bytes_down")}
    values |= {"updates": as_number(line.get("num_updates")), "failures": float(len(failures))}
    return {sys.intern(name): value for name, value in values.items()}


def _first(metrics: Any) -> list[tuple[str, Any]]:
    return [(as_text(name), value) for name, value in list(as_object(metrics).items())[:MAX_METRICS]]
