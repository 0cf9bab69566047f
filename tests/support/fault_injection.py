"""Kill and stop processes of a federation, and measure how long its follower is silent."""

from __future__ import annotations

import io
import os
import threading
import time
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from fedlearn.deploy.rehearse import Rehearsal

PARTS = {  # part of the command line of each kind of process
    "coordinator": b"fedlearn.deploy.coordinator\0",
    "SuperLink": b"coordinator_side.superlink",
    "SuperExec": b"coordinator_side.superexec\0--runtime",
    "run": b"coordinator_side.superexec\0run",
    "node": b"fedlearn.deploy.node\0",
    "messenger": b"node_side.messenger",
    "trainer": b"fedlearn.deploy.trainer",
}
COORDINATOR_MACHINE = ("coordinator", "SuperLink", "SuperExec", "run")
NODE_MACHINE = ("node", "messenger", "trainer")
SAMPLE_S = 0.5
NS = 1e-9


def processes_of(folder: Path, *parts: str) -> list[int]:
    """Return the ids of the processes of some kinds that name a folder; the kinds in their order."""
    found: dict[str, list[int]] = {part: [] for part in parts}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            for part in parts:
                if PARTS[part] in words and bytes(folder) in words + (path.parent / "environ").read_bytes():
                    found[part].append(int(path.parent.name))
    return [process for part in parts for process in sorted(found[part])]


def send(number: int, processes: list[int]) -> None:
    """Send a signal to processes; some of them may have ended."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


class LinesOfThisThread(io.StringIO):
    """Keep the text that this thread writes. Text of other threads goes to another stream.

    The redirection of a stream holds for all threads, and the follower writes lines in a thread.

    Args:
        other: stream for the text of other threads.
    """

    def __init__(self, other: io.StringIO) -> None:
        super().__init__()
        self.other, self.thread = other, threading.get_ident()

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self.thread else self.other.write(text)


class Recorder(io.StringIO):
    """Keep the time of each line, and write the lines to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.times = path, [time.monotonic()]

    def write(self, text: str) -> int:
        if "\n" in text:
            self.times.append(time.monotonic())
        self.note(text)
        return super().write(text)

    def note(self, text: str) -> None:
        """Write a text of the test to the file. It does not end a silence."""
        with self.path.open("a") as file:
            file.write(f"{time.monotonic() - self.times[0]:7.1f} {text}" if "\n" in text else text)

    def restart_exited(self, rehearsal: Rehearsal) -> None:
        """Restart processes that ended, as an init system does; its lines do not end a silence."""
        lines = LinesOfThisThread(self)
        with redirect_stderr(lines):
            rehearsal.restart_exited()
        if lines.getvalue():
            self.note(lines.getvalue())

    @property
    def silences(self) -> list[tuple[float, float]]:
        """Return start and end of each pause between two lines, on the monotonic clock."""
        return [*pairwise([*self.times, time.monotonic()])]

    @property
    def longest_silence_s(self) -> float:
        return max(end - start for start, end in self.silences)


@dataclass(frozen=True)
class Sample:
    """Processor time of a federation at a time, in seconds.

    Attributes:
        at: time on the monotonic clock.
        run: processor time of the federation since the last sample.
        wait: time in which its threads were ready and had no processor, since the last sample.
        busy: processor time of the whole machine since the last sample.
    """

    at: float
    run: float
    wait: float
    busy: float


@dataclass
class LoadMeter:
    """Measure the processor time of a federation, and the time in which it waits for a processor.

    Args:
        folder: folder that all processes of the federation name.
    """

    folder: Path
    samples: list[Sample] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> LoadMeter:
        threading.Thread(target=self._measure, daemon=True, name="load").start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def quiet_s(self, start: float, end: float) -> float:
        """Return the seconds that a time would last on a machine without other programs.

        A sample counts less by ``waiting * others``. ``waiting`` is the share of the time in which the ready threads of
        the federation wait for a processor. ``others`` is the share of other programs in the busy time.
        """
        total = 0.0
        for last, sample in pairwise(self.samples):
            seconds = min(end, sample.at) - max(start, last.at)
            if seconds > 0.0:
                waiting = sample.wait / max(sample.run + sample.wait, 1e-9)
                others = max(sample.busy - sample.run, 0.0) / max(sample.busy, 1e-9)
                total += seconds * (1.0 - waiting * others)
        return total

    def _measure(self) -> None:
        times, busy = self._read_times(), _busy_s()
        while not self._ended.wait(SAMPLE_S):
            now, now_busy = self._read_times(), _busy_s()
            changes = [
                [
                    max(0.0, after - before)
                    for after, before in zip(now[thread], times.get(thread, (0.0, 0.0)), strict=True)
                ]
                for thread in now
            ]
            run, wait = (sum(change[place] for change in changes) for place in (0, 1))
            self.samples.append(Sample(time.monotonic(), run, wait, now_busy - busy))
            times, busy = now, now_busy

    def _read_times(self) -> dict[str, tuple[float, float]]:
        found = {}
        for process in processes_of(self.folder, *PARTS):
            for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
                with suppress(OSError, ValueError):
                    run, wait, _ = path.read_text().split()
                    found[path.parent.name] = (NS * int(run), NS * int(wait))
        return found


def _busy_s() -> float:
    """Return the processor time of all programs since the start of the machine."""
    numbers = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = numbers[3] + numbers[4]
    return (sum(numbers) - idle) / os.sysconf("SC_CLK_TCK")
