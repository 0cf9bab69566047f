"""Looking on at a run: its lines as they come, Ctrl-C, and a coordinator that goes away and comes back."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fedlearn.core.command_line import DONE, FAILED, STOPPED
from fedlearn.deploy.connectivity import ConnectionProblem, is_final
from fedlearn.deploy.coordinator_side.app_bundle import REQUEST_KEY, build_app_bundle, parse_exit_code
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient, RunStatus
from fedlearn.errors import FedlearnError

START_TIMEOUT_S = (
    180.0  # seconds for the coordinator to begin a run; what it takes to import everything, several times over
)
SILENCE_TIMEOUT_S = 20.0  # seconds without a line after which the coordinator is asked whether it is still there
FLOWER_LOG_LINE = re.compile(r"^(\x1b\[\d+m)?(INFO|DEBUG)\s*(\x1b\[0m)?:|^Successfully installed fedlearn-run ")
FOLDER_LINE = re.compile(r"^run        (.+)$")


RESUME_COMMAND = "python -m fedlearn.deploy.submit --resume {folder}"


class RunStartTimeout(FedlearnError):
    """The coordinator has taken a run, and does not begin it."""


class Disconnected(Exception):
    """The connection broke, or fell silent."""


@dataclass
class Follower:
    """Shows a run until it ends.

    Args:
        address: of the coordinator.
        keys: the operator's.
        reconnect_timeout_s: seconds to wait for a coordinator that has gone away.
        on_idle: called a few times a second while there is nothing to show.
        resume_command: the command that goes on with a run, with ``{folder}`` for the run's.

    Attributes:
        folder: of the run, at the coordinator; empty until it is known.
    """

    address: str
    keys: Path
    reconnect_timeout_s: float
    on_idle: Callable[[], None] = lambda: None
    resume_command: str = RESUME_COMMAND
    folder: str = field(default="", init=False)
    _asked: int = field(default=0, init=False)  # how often it was to stop
    _handled: int = field(default=0, init=False)
    _after: float = field(default=0.0, init=False)
    _rest: str = field(default="", init=False)

    def run(self, request: Mapping[str, Any]) -> int:
        """Start a run and show it to its end; the exit code.

        Args:
            request: ``settings``, ``folder``, ``chosen`` and ``rerun_command``, see
                `fedlearn.deploy.coordinator_side.server_app`.

        Raises:
            ConnectionProblem: the coordinator cannot be reached, refuses, or is lost for good.
        """
        return self.follow(
            self.submit({"do": "run", **request, "resume_command": self.resume_command, "width": terminal_width()})
        )

    def resume_run(self, folder: str, overrides: Sequence[str] = ()) -> int:
        """Go on with a run and show it to its end; the exit code.

        Raises:
            ConnectionProblem: as `run`.
        """
        self.folder = folder
        return self.follow(self._order_to_go_on(overrides))

    def submit(self, request: Mapping[str, Any]) -> int:
        """Give an order; Flower's id of the run that carries it out.

        Raises:
            ConnectionProblem: the coordinator cannot be reached or refuses.
        """
        control = CoordinatorClient(self.address, self.keys)
        try:
            run_id = control.start(build_app_bundle(), {REQUEST_KEY: json.dumps(request)})
        finally:
            control.close()
        self._after = 0.0
        sys.stdout.write(f"submitted  {run_id} to {self.address}\n")
        sys.stdout.flush()
        return run_id

    def follow(self, run_id: int) -> int:
        """Show a run to its end, and go on with it if the coordinator was lost on the way; the exit code.

        Raises:
            ConnectionProblem: the coordinator is not back within ``reconnect_timeout_s``.
        """
        lost = False
        with self._stoppable():
            while True:
                try:
                    status = self._watch(run_id)
                except Disconnected as error:
                    self._say(f"lost the coordinator ({error}); waiting for it")
                    self._until_back()
                    lost = True
                    continue
                code = _code(status)
                if not (lost and code is None and self.folder) or self._asked:
                    return self._ended(status, code)
                self._say("the run was cut off; going on from its last checkpoint")
                lost = False
                run_id = self._order_to_go_on()

    def _order_to_go_on(self, overrides: Sequence[str] = ()) -> int:
        return self.submit(
            {"do": "resume", "folder": self.folder, "overrides": list(overrides), "width": terminal_width()}
        )

    def _how_to_go_on(self) -> str:
        return self.resume_command.replace("{folder}", shlex.quote(self.folder)) if self.folder else "submit it again"

    def _watch(self, run_id: int) -> RunStatus:
        control, lines = CoordinatorClient(self.address, self.keys), queue.Queue[Any]()
        threading.Thread(target=self._read, args=(control, run_id, lines), daemon=True).start()
        try:
            began = heard = time.monotonic()
            while True:
                self.on_idle()
                self._pass_on_stop(control, run_id)
                with suppress(queue.Empty):
                    piece = lines.get(timeout=0.3)
                    heard = time.monotonic()
                    if piece is None:
                        return self._finished(control, run_id)
                    if isinstance(piece, Exception):
                        raise Disconnected(_first_line(piece))
                    self._show(*piece)
                if time.monotonic() - heard > SILENCE_TIMEOUT_S:
                    self._refuse_if_not_begun(control, run_id, time.monotonic() - began)
                    heard = time.monotonic()
        except ConnectionProblem as error:
            raise Disconnected(_first_line(error)) from error
        finally:
            control.close()

    def _refuse_if_not_begun(self, control: CoordinatorClient, run_id: int, waited: float) -> None:
        if control.status(run_id).status in ("pending", "starting") and waited > START_TIMEOUT_S:
            control.stop(run_id)
            fix = "superexec.log in the coordinator's --state, which says why; the run is taken back"
            raise RunStartTimeout(
                f"{self.address} has not begun the run within {START_TIMEOUT_S:.0f} s\n  try       {fix}"
            )

    def _read(self, control: CoordinatorClient, run_id: int, lines: queue.Queue[Any]) -> None:
        """Its own thread, because a broken connection may never say so."""
        try:
            for piece in control.log(run_id, self._after):
                lines.put(piece)
            lines.put(None)
        except Exception as error:
            lines.put(error)

    def _finished(self, control: CoordinatorClient, run_id: int) -> RunStatus:
        status = control.status(run_id)
        if not status.finished:
            raise Disconnected("its log ended")
        self._show("\n" if self._rest else "", self._after)
        return status

    def _show(self, text: str, at: float) -> None:
        self._after = max(self._after, at)
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if FLOWER_LOG_LINE.match(line):
                continue
            found = FOLDER_LINE.match(line)
            self.folder = found[1] if found else self.folder
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def _pass_on_stop(self, control: CoordinatorClient, run_id: int) -> None:
        while self._handled < self._asked:
            if self._handled == 0:
                control.start(build_app_bundle(), {REQUEST_KEY: json.dumps({"do": "stop", "run": run_id})})
            elif not control.status(run_id).finished:
                control.stop(run_id)
            self._handled += 1

    def _until_back(self) -> None:
        until = time.monotonic() + self.reconnect_timeout_s
        while True:
            try:
                control = CoordinatorClient(self.address, self.keys)
                try:
                    control.nodes()
                finally:
                    control.close()
                return
            except ConnectionProblem as error:
                if time.monotonic() > until or self._asked or is_final(error):
                    raise ConnectionProblem(f"{error}\n  later     {self._how_to_go_on()}") from error
                self.on_idle()
                time.sleep(0.5)

    def _ended(self, status: RunStatus, code: int | None) -> int:
        if code is not None:
            return code
        if status.sub_status == "stopped":
            self._say("stopped at once; what was saved stays")
        else:
            self._say(f"the run failed: {status.details or 'Flower does not say why'}")
        self._say(f" resume    {self._how_to_go_on()}")
        return STOPPED if status.sub_status == "stopped" else FAILED

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Note Ctrl-C and SIGTERM instead of ending; the third ends this program, not the run."""

        def note(number: int, frame: FrameType | None) -> None:
            self._asked += 1
            if self._asked > 2:
                raise KeyboardInterrupt
            self._say("\n asked to stop (once more stops at once)" if self._asked == 1 else " stopping at once")

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _code(status: RunStatus) -> int | None:
    """The exit code of a run that came to an end of its own, None for one that was cut off."""
    return DONE if status.sub_status == "completed" else parse_exit_code(status.details)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def terminal_width() -> int | None:
    """The width of the terminal that looks on, None for a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
