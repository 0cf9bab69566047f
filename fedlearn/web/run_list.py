"""Find the run folders below a folder, and keep their descriptions up to date."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedlearn.callbacks.run_history import METRICS_FILE
from fedlearn.runner.run_folder import CONFIG_FILE, LOCK_FILE, LOG_FILE
from fedlearn.web.history_file import HistoryFile
from fedlearn.web.run_views import RUNNING, STARTING, RunDetail, RunView, detail_run, read_report, view_run
from fedlearn.web.safe_files import locked_inodes

MAX_DEPTH = 8  # levels of folders below the watched folder
MAX_ENTRIES = 50_000  # entries of folders that one search reads
MAX_RUNS = 200  # runs in the list, the newest first
FILES = (METRICS_FILE, "summary.json", "environment.json", "report.html", LOCK_FILE)  # files that the list reads


@dataclass(frozen=True)
class RunPath:
    """A run folder, its key, and the time of its last change in seconds since 1970."""

    key: str
    folder: Path
    changed: float


@dataclass
class _Entry:
    history: HistoryFile
    stamp: tuple[object, ...] = ()
    view: RunView | None = None
    detail: RunDetail | None = None  # belongs to the present stamp


@dataclass
class RunList:
    """The runs in a folder.

    Args:
        root: folder with run folders at any level.

    Attributes:
        num_runs: number of run folders at the last update; the list has the newest 200 of them.
    """

    root: Path
    num_runs: int = 0
    _entries: dict[str, _Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = Path(self.root).resolve()

    def update(self) -> Sequence[RunView]:
        """Return the newest runs: the runs in progress first, then by the time of their last change."""
        found = sorted(find_runs(self.root), key=lambda run: (-run.changed, run.key))
        self.num_runs = len(found)
        locks = locked_inodes()
        shown = found[:MAX_RUNS]
        self._entries = {run.key: self._entries.get(run.key) or self._new_entry(run) for run in shown}
        views = [self._view(run, locks) for run in shown]
        return sorted(views, key=lambda view: view.state not in (RUNNING, STARTING))

    def detail(self, key: str) -> RunDetail | None:
        """Return all about a run in the list; None for other keys."""
        entry = self._entries.get(key)
        if entry is None or entry.view is None:
            return None
        if entry.detail is None:
            self._forget_details()
            entry.history.update()
            entry.detail = detail_run(entry.history, entry.view)
        return entry.detail

    def _forget_details(self) -> None:
        """Keep only the rounds of runs in progress: the memory does not grow with the runs that a person opens."""
        for entry in self._entries.values():
            entry.detail = None
            if entry.view and entry.view.state not in (RUNNING, STARTING):
                entry.history = HistoryFile(self.root, entry.history.folder)

    def report(self, key: str) -> bytes:
        """Return ``report.html`` of a run in the list; empty for other keys, and without a report."""
        if key not in self._entries:  # the server has restarted since the page was loaded
            self.update()
        entry = self._entries.get(key)
        return read_report(self.root, entry.history.folder) if entry else b""

    def _new_entry(self, run: RunPath) -> _Entry:
        return _Entry(HistoryFile(self.root, run.folder))

    def _view(self, run: RunPath, locks: set[int] | None) -> RunView:
        entry = self._entries[run.key]
        status = {name: _status(run.folder / name) for name in FILES}
        lock = status.pop(LOCK_FILE)
        is_locked = lock is not None and locks is not None and lock.st_ino in locks
        stamp = (
            is_locked,
            *((each.st_mtime_ns, each.st_size, each.st_ino) if each else None for each in status.values()),
        )
        if entry.view is None or entry.stamp != stamp:
            entry.history.update()
            entry.stamp, entry.view = stamp, view_run(entry.history, run.key, is_locked=is_locked)
            entry.detail = None
            if not is_locked:
                entry.history = self._new_entry(run).history
        return entry.view


def find_runs(root: Path) -> Iterator[RunPath]:
    """Yield the run folders below a folder. Links and hidden folders are left out; a run folder has no run folders."""
    budget = MAX_ENTRIES
    waiting = [(root, 0)]
    while waiting and budget > 0:
        folder, depth = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError:
            continue
        budget -= len(listed)
        files = {entry.name: entry for entry in listed if entry.is_file(follow_symlinks=False)}
        if METRICS_FILE in files or (CONFIG_FILE in files and LOG_FILE in files):
            newest = [entry for name, entry in files.items() if name in (METRICS_FILE, LOG_FILE, "summary.json")]
            key = folder.relative_to(root).as_posix()
            yield RunPath(key, folder, max((_changed(entry) for entry in newest), default=0.0))
        elif depth < MAX_DEPTH:
            inner = [entry for entry in listed if entry.is_dir(follow_symlinks=False)]
            waiting += [(folder / entry.name, depth + 1) for entry in inner if not entry.name.startswith(".")]


def _changed(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None
