"""Define the source of the page: nodes and runs as plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedlearn.web.run_list import RunList
from fedlearn.web.run_views import RunDetail, RunView


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """One node of a federation.

    Attributes:
        name: name of its key.
        state: ``online``, ``offline`` or ``registered``.
        since: time of its last connection or of its end, UTC, in ISO 8601; empty if it never connected.
        version: version of fedlearn at the node; empty if unknown.
        framework: framework of the node; empty if unknown.
        problem: cause if the node cannot work; empty for a healthy node.
    """

    name: str
    state: str
    since: str = ""
    version: str = ""
    framework: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that the list of the page shows.

    Attributes:
        title: name of the folder, or address of the coordinator.
        runs: runs, in the order of the page.
        num_runs: number of all runs; the list may be shorter.
        nodes: nodes of the federation; None for simulations.
        problem: cause if the source cannot be read; empty otherwise.
    """

    title: str
    runs: Sequence[RunView]
    num_runs: int
    nodes: Sequence[NodeView] | None = None
    problem: str = ""


class Source(Protocol):
    """Provide nodes and runs. The methods may block, and are called from one thread at a time."""

    def snapshot(self) -> Snapshot:
        """Return the present nodes and runs."""

    def detail(self, key: str) -> RunDetail | None:
        """Return all about a run of the last snapshot; None for other keys."""

    def report(self, key: str) -> bytes:
        """Return ``report.html`` of a run of the last snapshot; empty without a report, and for other keys."""


@dataclass
class FolderSource:
    """The runs of simulations in a folder.

    Args:
        folder: folder with run folders at any level.
    """

    folder: Path
    runs: RunList = field(init=False)

    def __post_init__(self) -> None:
        self.runs = RunList(self.folder)

    def snapshot(self) -> Snapshot:
        """Return the runs that are in the folder now."""
        views = self.runs.update()
        return Snapshot(title=self.runs.root.name or "/", runs=views, num_runs=self.runs.num_runs)

    def detail(self, key: str) -> RunDetail | None:
        """Return all about a run; None for other keys."""
        return self.runs.detail(key)

    def report(self, key: str) -> bytes:
        """Return the report of a run; empty without a report, and for other keys."""
        return self.runs.report(key)


def as_json(record: Snapshot | RunDetail) -> Mapping[str, Any]:
    """Return a record as plain values."""
    return asdict(record)
