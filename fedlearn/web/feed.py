"""Watch a source while a page is open, and send its changes to all open pages."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from fedlearn.web.sources import Source, as_json

log = logging.getLogger(__name__)
INTERVAL_S = 1.0  # seconds between two looks at the source
HEARTBEAT_S = 10.0  # seconds without a message after which a comment is sent
MAX_READERS = 50  # pages that are open at the same time


@dataclass
class Feed:
    """Send changes of a source to open pages as server-sent events. Without a reader the source is not read.

    Args:
        source: nodes and runs.
        interval_s: seconds between two looks at the source, > 0.
    """

    source: Source
    interval_s: float = INTERVAL_S
    num_readers: int = 0
    _state: str = ""  # the last snapshot as JSON
    _num_changes: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _task: asyncio.Task[None] | None = None

    async def detail(self, key: str) -> str:
        """Return all about a run as JSON; empty for a key that the last snapshot does not have."""
        async with self._lock:
            return await asyncio.to_thread(self._read_detail, key)

    async def report(self, key: str) -> bytes:
        """Return the report of a run; empty without a report."""
        async with self._lock:
            return await asyncio.to_thread(self.source.report, key)

    async def events(self, key: str, is_active: Callable[[], bool]) -> AsyncIterator[str]:
        """Yield server-sent events: ``state`` for the list, and ``run`` for one run, each as it changes.

        Args:
            key: key of the run that the page shows; empty for the list only.
            is_active: returns whether the reader may still read; the events end otherwise.
        """
        self.num_readers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        sent = {"state": "", "run": ""}
        try:
            while is_active():
                num_changes = self._num_changes
                present = {"state": self._state, "run": await self.detail(key) if key and self._state else ""}
                news = [name for name, text in present.items() if text and text != sent[name]]
                sent |= {name: present[name] for name in news}
                for name in news:
                    yield f"event: {name}\ndata: {present[name]}\n\n"
                if not news:
                    yield ": alive\n\n"
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wait_for_change(num_changes), HEARTBEAT_S)
        finally:
            self.num_readers -= 1

    async def _wait_for_change(self, num_changes: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_changes != num_changes)

    async def _watch(self) -> None:
        while self.num_readers:
            async with self._lock:
                state = await asyncio.to_thread(self._read_state)
            if state and state != self._state:
                self._state, self._num_changes = state, self._num_changes + 1
                async with self._changed:
                    self._changed.notify_all()
            await asyncio.sleep(self.interval_s)
        self._state = ""  # the next reader gets a new look

    def _read_state(self) -> str:
        try:
            return _dump(as_json(self.source.snapshot()))
        except Exception:  # the page shows the last state, and the next look may succeed
            log.exception("the runs cannot be read")
            return ""

    def _read_detail(self, key: str) -> str:
        detail = self.source.detail(key)
        return _dump(as_json(detail)) if detail else ""


def _dump(value: object) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
