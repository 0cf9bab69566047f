"""Follow a run at a coordinator: show its lines, pass on Ctrl-C, and reconnect to a lost coordinator."""

from __future__ import annotations

import json
import queue
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fedlearn.core.command_line import FAILED, STOPPED
from fedlearn.core.plain_text import plain_line, plain_text
from fedlearn.deploy.connectivity import ConnectionProblem, is_final
from fedlearn.deploy.coordinator_side.app_bundle import REQUEST_KEY, build_app_bundle
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient, RunStatus, parse_end
from fedlearn.errors import FedlearnError

MIN_PAUSE_S = 0.5  # shortest pause between two pieces that counts
START_TIMEOUT_S = 180.0  # seconds for the coordinator to start a run; several times the duration of all imports
SILENCE_TIMEOUT_S = 10.0  # seconds without a line after which connection and nodes are checked
SLOW_FACTOR = 2.0  # a silence that is longer than this multiple of the usual pause is named
SUCCESSOR_TIMEOUT_S = 90.0  # seconds for the coordinator to resume an interrupted run; it may restart meanwhile
FLOWER_LOG_LINE = re.compile(r"^(\x1b\[\d+m)?(INFO|DEBUG|WARNING)\s*(\x1b\[0m)?:|^Successfully installed fedlearn-run ")
FOLDER_LINE = re.compile(r"^run        (.+)$")
RESUME_COMMAND = "python -m fedlearn.deploy.submit --resume {folder}"


class RunStartTimeout(FedlearnError):
    """Report a coordinator that accepted a run and did not start it in time."""


class Disconnected(Exception):
    """Report a connection to the coordinator that is lost."""


@dataclass
class Follower:
    """Submit runs to a coordinator and show them until they end.

    Args:
        address: address of the coordinator, ``host:port``.
        keys: folder with the operator's keys.
        reconnect_timeout_s: seconds to wait for a lost coordinator.
        on_idle: function that is called several times per second while the run is shown.
        resume_command: command that resumes a run; ``{folder}`` stands for the run folder.

    Attributes:
        folder: run folder at the coordinator; empty until the run prints it.
    """

    address: str
    keys: Path
    reconnect_timeout_s: float
    on_idle: Callable[[], None] = lambda: None
    resume_command: str = RESUME_COMMAND
    folder: str = field(default="", init=False)
    _num_stops: int = field(default=0, init=False)  # number of Ctrl-C and SIGTERM so far
    _num_sent: int = field(default=0, init=False)  # number of stops that were sent to the coordinator
    _shown_until: float = field(default=0.0, init=False)  # timestamp of the last shown piece of the log
    _partial_line: str = field(default="", init=False)
    _waits_for: str = field(default="", init=False)  # part whose answer this program awaits; empty while a run is shown
    _pauses: deque[float] = field(default_factory=lambda: deque(maxlen=20), init=False)  # seconds between pieces
    _reported_at: float = field(default_factory=time.monotonic, init=False)  # time of the last line

    def run(self, request: Mapping[str, Any]) -> int:
        """Submit a run, show it until it ends, and return its exit code.

        Args:
            request: ``settings``, ``folder``, ``chosen`` and ``rerun_command``, see
                `fedlearn.deploy.coordinator_side.server_app`.

        Raises:
            ConnectionProblem: The coordinator is unreachable, refuses the run, or is lost for too long.
        """
        return self.follow(
            self.submit({"do": "run", **request, "resume_command": self.resume_command, "width": terminal_width()})
        )

    def resume_run(self, folder: str, overrides: Sequence[str] = ()) -> int:
        """Resume a run, show it until it ends, and return its exit code.

        Args:
            folder: run folder at the coordinator.
            overrides: settings that change, e.g. ``rounds=50``.

        Raises:
            ConnectionProblem: The coordinator is unreachable, refuses the run, or is lost for too long.
        """
        self.folder = folder
        return self.follow(self._submit_resume(overrides))

    def submit(self, request: Mapping[str, Any]) -> int:
        """Send a request to the coordinator, and return Flower's id of the run that executes it.

        Args:
            request: see `fedlearn.deploy.coordinator_side.server_app`.

        Raises:
            ConnectionProblem: The coordinator is unreachable, or refuses the request.
        """
        control = CoordinatorClient(self.address, self.keys)
        try:
            run_id = control.start(build_app_bundle(), {REQUEST_KEY: json.dumps(request)})
        finally:
            control.close()
        self._shown_until = 0.0
        sys.stdout.write(f"submitted  {run_id} to {self.address}\n")
        sys.stdout.flush()
        return run_id

    def follow(self, run_id: int) -> int:
        """Show a run until it ends, and return its exit code. Follow the run that resumes it, too.

        Args:
            run_id: Flower's id of the run.

        Raises:
            ConnectionProblem: The coordinator is lost for more than ``reconnect_timeout_s``.
        """
        with self._stoppable(), self._watchdog():
            while True:
                try:
                    status = self._watch(run_id)
                    code = parse_end(status)
                    is_interrupted = code is None and not self._num_stops
                    successor = self._find_successor(run_id, status) if is_interrupted else None
                except Disconnected as error:
                    self._report(f"lost the coordinator ({error}); waiting for it")
                    self._wait_for_coordinator()
                    continue
                if successor is None:
                    return self._report_end(status, code)
                self._report("the run was interrupted; it resumes from its last checkpoint")
                run_id, self._shown_until, self._partial_line = successor, 0.0, ""

    def _find_successor(self, run_id: int, status: RunStatus) -> int | None:
        """Return the new run that continues an interrupted run; None if there is none in time.

        A run that was stopped has its successor already.
        """
        self._waits_for = "the coordinator, which resumes the run"
        deadline = time.monotonic() + (SUCCESSOR_TIMEOUT_S if status.sub_status != "stopped" else 0.0)
        control = CoordinatorClient(self.address, self.keys)
        try:
            while (successor := control.successor(run_id)) is None and time.monotonic() < deadline:
                self.on_idle()
                time.sleep(0.5)
            return successor
        except ConnectionProblem as error:
            raise Disconnected(_first_line(error)) from error
        finally:
            control.close()

    def _submit_resume(self, overrides: Sequence[str] = ()) -> int:
        return self.submit(
            {"do": "resume", "folder": self.folder, "overrides": list(overrides), "width": terminal_width()}
        )

    def _format_resume_command(self) -> str:
        return (
            self.resume_command.replace("{folder}", shlex.quote(self.folder)) if self.folder else "submit the run again"
        )

    def _watch(self, run_id: int) -> RunStatus:
        control, lines = CoordinatorClient(self.address, self.keys), queue.Queue[Any]()
        threading.Thread(target=self._read_log, args=(control, run_id, lines), daemon=True).start()
        try:
            start, checked_at = time.monotonic(), self._reported_at
            while True:
                self.on_idle()
                self._send_stop(control, run_id)
                with suppress(queue.Empty):
                    self._waits_for = ""
                    piece = lines.get(timeout=0.3)
                    if piece is None:
                        return self._final_status(control, run_id)
                    if isinstance(piece, Exception):
                        raise Disconnected(_first_line(piece))
                    self._show(*piece)
                    checked_at = max(checked_at, self._reported_at)
                if self._is_check_due(checked_at):
                    self._waits_for = "an answer of the coordinator"
                    self._require_start(control, run_id, time.monotonic() - start)
                    self._report_wait(control, run_id)
                    checked_at = time.monotonic()
        except ConnectionProblem as error:
            raise Disconnected(_first_line(error)) from error
        finally:
            control.close()

    def _require_start(self, control: CoordinatorClient, run_id: int, waited_s: float) -> None:
        """Check the connection; cancel the run if the coordinator did not start it in time."""
        if control.status(run_id).status in ("pending", "starting") and waited_s > START_TIMEOUT_S:
            control.stop(run_id)
            fix = "superexec.log in the coordinator's --state folder, which has the cause; the run is cancelled"
            raise RunStartTimeout(
                f"{self.address} has not started the run within {START_TIMEOUT_S:.0f} s\n  advice    {fix}"
            )

    def _report_wait(self, control: CoordinatorClient, run_id: int) -> None:
        """Name the causes of a silence that the run itself cannot report: it starts, hangs, or lacks nodes."""
        status = control.status(run_id).status
        absent = [node.name for node in control.node_states() if node.state == "offline"]
        causes = [f"the run is {status}"] if status != "running" or not self.folder else []
        causes += [f"not connected: {', '.join(absent)}"] if absent else []
        pause_s = time.monotonic() - self._reported_at
        if not causes and pause_s > self._slow_s:
            causes = [f"no line of the run for {pause_s:.0f} s, longer than usual"]
        if causes:
            self._report(f"waiting    {'; '.join(causes)}")

    @property
    def _slow_s(self) -> float:
        """Seconds after which a pause is longer than usual. Faults lengthen some pauses, so a short one is usual."""
        pauses = sorted(self._pauses) or [0.0]
        return max(SILENCE_TIMEOUT_S, SLOW_FACTOR * pauses[len(pauses) // 4])

    def _is_check_due(self, checked_at: float) -> bool:
        """Return whether to look for the cause of a silence: at intervals, and when it gets longer than usual."""
        now, slow_at = time.monotonic(), self._reported_at + self._slow_s
        return now - checked_at > SILENCE_TIMEOUT_S or checked_at <= slow_at < now

    def _read_log(self, control: CoordinatorClient, run_id: int, lines: queue.Queue[Any]) -> None:
        """Put the log into a queue, in a separate thread, because a broken connection may block forever."""
        try:
            for piece in control.log(run_id, self._shown_until):
                lines.put(piece)
            lines.put(None)
        except Exception as error:
            lines.put(error)

    def _final_status(self, control: CoordinatorClient, run_id: int) -> RunStatus:
        status = control.status(run_id)
        if not status.finished:
            raise Disconnected("its log ended")
        self._show("\n" if self._partial_line else "", self._shown_until)
        return status

    def _show(self, text: str, at: float) -> None:
        self._shown_until = max(self._shown_until, at)
        *lines, self._partial_line = (self._partial_line + text).split("\n")
        for line in lines:
            if FLOWER_LOG_LINE.match(line):
                continue
            if (pause_s := time.monotonic() - self._reported_at) > MIN_PAUSE_S:  # several lines may come at once
                self._pauses.append(pause_s)
            self._reported_at = time.monotonic()
            match = FOLDER_LINE.match(line)
            self.folder = plain_line(match[1], max_length=1000) if match else self.folder
            sys.stdout.write(f"{plain_text(line, keep_styles=True)}\n")
        sys.stdout.flush()

    def _send_stop(self, control: CoordinatorClient, run_id: int) -> None:
        while self._num_sent < self._num_stops:
            if self._num_sent == 0:
                control.start(build_app_bundle(), {REQUEST_KEY: json.dumps({"do": "stop", "run": run_id})})
            elif not control.status(run_id).finished:
                control.stop(run_id)
            self._num_sent += 1

    def _wait_for_coordinator(self) -> None:
        self._waits_for = "the coordinator"
        deadline = time.monotonic() + self.reconnect_timeout_s
        while True:
            try:
                control = CoordinatorClient(self.address, self.keys)
                try:
                    control.nodes()
                finally:
                    control.close()
                return
            except ConnectionProblem as error:
                if time.monotonic() > deadline or self._num_stops or is_final(error):
                    raise ConnectionProblem(f"{error}\n  later     {self._format_resume_command()}") from error
                self.on_idle()
                time.sleep(0.5)

    def _report_end(self, status: RunStatus, code: int | None) -> int:
        if code is not None:
            return code
        if status.sub_status == "stopped":
            where = "at once" if self._num_stops else "at the coordinator"
            self._report(f"stopped {where}; saved rounds are kept")
        else:
            self._report(f"the run failed: {status.details or 'Flower gives no reason'}")
        self._report(f" resume    {self._format_resume_command()}")
        return STOPPED if status.sub_status == "stopped" else FAILED

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Count Ctrl-C and SIGTERM instead of ending; the third one ends this program, not the run."""

        def count(number: int, frame: FrameType | None) -> None:
            self._num_stops += 1
            if self._num_stops > 2:
                raise KeyboardInterrupt
            self._report(
                "\n stop requested (press Ctrl-C again to stop at once)"
                if self._num_stops == 1
                else " stopping at once"
            )

        previous = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def _watchdog(self) -> Iterator[None]:
        """Name the cause of a silence in a thread, also while a request to the coordinator blocks."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                if self._waits_for and time.monotonic() - self._reported_at >= SILENCE_TIMEOUT_S:
                    self._report(f"waiting    for {self._waits_for}")

        threading.Thread(target=watch, daemon=True, name="silence").start()
        try:
            yield
        finally:
            ended.set()

    def _report(self, line: str) -> None:
        self._reported_at = time.monotonic()
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _first_line(error: Exception) -> str:
    return plain_line((str(error) or type(error).__name__).splitlines()[0], max_length=500)


def terminal_width() -> int | None:
    """Return the width of the terminal in characters; None if the output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
