"""Write and verify an append-only log of events, in which each line has the hash of the line before.

Coordinator and node have such a log, ``audit.jsonl``. A line is one JSON object::

    {"event": "run.ended", "hash": "9c...", "n": 17, "prev": "4f...", "time": "2026-03-01T10:00:00.123Z", ...}

The file ``audit_head.json`` has the number and the hash of the newest line. `verify` finds each changed line, each
missing line in the middle, and a missing end. A person who can write both files can compute all later hashes again.
Only a head that was noted elsewhere shows such a change; see ``noted_head`` of `verify`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedlearn.core.plain_text import plain_line
from fedlearn.core.private_files import write_private_json

AUDIT_FILE, HEAD_FILE = "audit.jsonl", "audit_head.json"
MAX_TEXT, MAX_ITEMS, MAX_DEPTH = 200, 100, 8  # characters of a text, items of a list or mapping, nested values
MAX_LINE_BYTES = 16384
START = "0" * 64  # hash before the first line
DAMAGED, REPAIRED = "log.damaged", "log.repaired"  # events about the log itself
RESERVED = ("n", "time", "event", "prev", "hash")


@dataclass(frozen=True)
class Head:
    """The number and the hash of the newest line of a log."""

    count: int = 0
    hash: str = START

    def __str__(self) -> str:
        return f"{self.count}:{self.hash}"


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes:
        head: number and hash of the newest line.
        problems: sentences, one per problem; empty for an intact log.
    """

    head: Head
    problems: tuple[str, ...]


class AuditLog:
    """An append-only log in a folder. Several processes may write it.

    Args:
        folder: folder of the log; it is created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.head_path = folder / AUDIT_FILE, folder / HEAD_FILE

    def append(self, event: str, **fields: Any) -> Head:
        """Write a line, and return after it is on disk.

        Texts become one printable line of at most `MAX_TEXT` characters. Long lists, deep values and long lines are
        cut. So no value of another party controls a terminal or fills the disk.

        Args:
            event: name of the event, e.g. ``run.ended``.
            fields: texts, numbers, booleans, None, and lists and mappings of them.

        Raises:
            TypeError: A value has another type, e.g. an array, which could hold data.
            OSError: The disk is full, or the folder is not writable.
        """
        values = {name: plain_value(value) for name, value in fields.items()}
        if reserved := values.keys() & set(RESERVED):
            raise TypeError(f"an event has the reserved fields {sorted(reserved)}")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(self.path.with_name(f".{AUDIT_FILE}.lock"), mode=0o600):
            tail, num_torn = self._read_tail()
            head = self.read_head()
            if num_torn:
                tail = self._write(REPAIRED, {"num_bytes": num_torn}, tail)
            # a crash between both files leaves at most the newest lines without a head
            if tail.count < head.count or (tail.count == head.count and tail.hash != head.hash):
                lost = {"expected": str(head), "found": str(tail)}
                tail = self._write(DAMAGED, lost, Head(max(head.count, tail.count), tail.hash))
            newest = self._write(event, values, tail)
            write_private_json(self.head_path, {"count": newest.count, "hash": newest.hash})
        return newest

    def read_head(self) -> Head:
        """Return the stored head; the start of a log if there is none."""
        try:
            content = json.loads(self.head_path.read_text(encoding="utf-8"))
            return Head(int(content["count"]), str(content["hash"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Head()

    def _write(self, event: str, values: Mapping[str, Any], previous: Head) -> Head:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"n": previous.count + 1, "time": now, "event": plain_value(event), **values, "prev": previous.hash}
        if len(_canonical(line)) > MAX_LINE_BYTES:
            digest = hashlib.sha256(_canonical(dict(values))).hexdigest()
            short = {name: value for name, value in values.items() if not isinstance(value, list | dict)}
            line = {**{name: line[name] for name in ("n", "time", "event", "prev")}, **short, "omitted_sha256": digest}
        line["hash"] = _hash(line)
        with open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
            file.write(_canonical(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return Head(line["n"], line["hash"])

    def _read_tail(self) -> tuple[Head, int]:
        """Return number and hash of the last line, after a torn line of a crash is removed, and its size in bytes."""
        try:
            with self.path.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                start = max(0, size - 4 * MAX_LINE_BYTES)
                file.seek(start)
                data = file.read()
                end = data.rfind(b"\n") + 1
                if end < len(data):
                    file.truncate(start + end)
                last = data[:end].rstrip(b"\n").rpartition(b"\n")[2]
        except FileNotFoundError:
            return Head(), 0
        try:
            content: dict[str, Any] = json.loads(last) if last else {"n": 0, "hash": START}
            return Head(int(content["n"]), str(content["hash"])), len(data) - end
        except (ValueError, KeyError, TypeError):  # a line that no `AuditLog` wrote
            return Head(), len(data) - end


class RefusalLimit:
    """Bound the lines that a person can cause with refused requests, so that no person fills the disk.

    Args:
        max_lines: lines per person within the window.
        window_s: seconds.
    """

    def __init__(self, max_lines: int = 100, window_s: float = 3600.0) -> None:
        self.max_lines, self.window_s = max_lines, window_s
        self._times: dict[str, list[float]] = {}

    def allows(self, person: str) -> bool:
        """Count a refused request of a person, and return whether it may have a line."""
        now = time.monotonic()
        times = [at for at in self._times.get(person, []) if now - at < self.window_s]
        is_allowed = len(times) < self.max_lines
        self._times[person] = [*times, now] if is_allowed else times
        return is_allowed


class ReadLimit:
    """Count equal reads of a person within a time as one line, so that no person fills the disk.

    Args:
        window_s: seconds.
    """

    def __init__(self, window_s: float = 600.0) -> None:
        self.window_s = window_s
        self._times: dict[tuple[str, ...], float] = {}

    def allows(self, *read: str) -> bool:
        """Count a read, and return whether it may have a line.

        Args:
            read: person, name of the request, and its arguments.
        """
        now = time.monotonic()
        if now - self._times.get(read, -self.window_s) < self.window_s:
            return False
        self._times = {key: at for key, at in self._times.items() if now - at < self.window_s} | {read: now}
        return True


def verify(folder: Path, noted_head: str = "") -> Verification:
    """Check each line of a log, the chain of hashes, and the end of the log.

    Args:
        folder: folder of the log.
        noted_head: head that was noted elsewhere earlier, ``NUMBER:HASH``; empty: none.
    """
    log = AuditLog(folder)
    problems, previous, hashes = list[str](), Head(), dict[int, str]()
    for number, raw in enumerate(_raw_lines(log.path), start=1):
        problem, line = _check_line(raw, previous)
        if problem:
            problems.append(f"line {number}: {problem}")
        if line is None:
            continue
        previous = Head(line["n"], line["hash"])
        hashes[line["n"]] = line["hash"]
        if line["event"] == DAMAGED:
            problems.append(f"line {number}: lines were missing or changed at {line['time']}: {line.get('expected')}")
    stored = log.read_head()
    if stored.count > previous.count:
        problems.append(f"the end is missing: the log ends at line {previous.count}, expected {stored.count}")
    elif hashes.get(stored.count, START) != stored.hash:
        problems.append(f"line {stored.count} is not the line of {HEAD_FILE}")
    elif hashes and not stored.count:
        problems.append(f"{HEAD_FILE} is missing, so a missing end cannot be found")
    if noted_head:
        count, _, digest = noted_head.partition(":")
        if not count.isdecimal() or hashes.get(int(count)) != digest:
            problems.append(f"the log does not have the noted head {plain_line(noted_head)}")
    return Verification(head=previous, problems=tuple(problems))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the readable lines of a log as mappings, the oldest first."""
    lines = (_parse(raw) for raw in _raw_lines(folder / AUDIT_FILE))
    return [line for line in lines if line is not None]


def plain_value(value: Any, depth: int = 0) -> Any:
    """Return a value of a log line: printable text, finite numbers, and short lists and mappings of them.

    Raises:
        TypeError: The value has another type.
    """
    if depth > MAX_DEPTH:
        return "..."
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return plain_line(str(value), max_length=MAX_TEXT)
    if type(value) is int:
        return value if abs(value) < 2**64 else "a huge number"
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        items = list(value.items())[:MAX_ITEMS]
        return {plain_line(str(name), max_length=MAX_TEXT): plain_value(item, depth + 1) for name, item in items}
    if isinstance(value, list | tuple):
        return [plain_value(item, depth + 1) for item in value[:MAX_ITEMS]]
    raise TypeError(f"a log line cannot have a value of type {type(value).__name__}")


def _check_line(raw: bytes, previous: Head) -> tuple[str, dict[str, Any] | None]:
    line = _parse(raw)
    if line is None:
        return "it is not a line of an audit log", None
    if _canonical(line) != raw or _hash({name: line[name] for name in line if name != "hash"}) != line["hash"]:
        return "it was changed", line
    if line["prev"] != previous.hash:
        return f"the line before it was changed or removed (number {line['n']} after {previous.count})", line
    if line["n"] != previous.count + 1:
        return f"its number is {line['n']}, expected {previous.count + 1}", line
    return "", line


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    types = {"n": int, "time": str, "event": str, "prev": str, "hash": str}
    is_line = isinstance(line, dict) and all(type(line.get(name)) is kind for name, kind in types.items())
    return line if is_line else None


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for raw in file:
                yield raw.removesuffix(b"\n")
    except FileNotFoundError:
        return


def _canonical(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _hash(line: Mapping[str, Any]) -> str:
    """Return the hash of a line. The line has the hash of the line before, under ``prev``."""
    return hashlib.sha256(_canonical(line)).hexdigest()
