"""Resume the runs whose process has died, without a person.

The process of a run can die alone, with the SuperExec, or with the machine. A run that ends without an exit code was
interrupted. The coordinator then starts a run of Flower that resumes the run folder from its last checkpoint. The new
request has the field ``continues``, the id of the interrupted run, by which `fedlearn.deploy.submit` follows it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.audit_log import AuditLog
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.coordinator_side.app_bundle import NAME_KEY, PERSON_KEY, REQUEST_KEY, build_app_bundle
from fedlearn.deploy.coordinator_side.control_api import RunStatus, parse_end
from fedlearn.deploy.coordinator_side.ownership import DEPLOYMENT_FILE
from fedlearn.deploy.coordinator_side.run_process import (
    forget_process,
    is_alive,
    known_processes,
    read_process,
    silence_s,
)
from fedlearn.deploy.coordinator_side.run_requests import read_request
from fedlearn.deploy.coordinator_side.submissions import SUBMISSIONS_FOLDER, Submissions
from fedlearn.deploy.supervision import say

PROCESSES_FILE = "run_processes.json"  # in the state folder: the processes that the SuperExec has started
MAX_ATTEMPTS = 10  # interruptions of a run without a new round, after which the coordinator does not resume it
STATUS_INTERVAL_S = 5.0  # seconds between two requests for the status of a run whose process lives
START_GRACE_S = 5.0  # seconds between the start of a run and the start of its process
MAX_AGE_S = 900.0  # seconds since the end of an interrupted run, after which a new coordinator does not resume it
HANG_TIMEOUT_S = 60.0  # seconds without a sign of life of a run, after which its process is killed


class RunControl(Protocol):
    """The part of a `CoordinatorClient` that the recovery needs."""

    def status(self, run_id: int) -> RunStatus:
        """Return the status of a run."""
        ...

    def configs(self) -> Mapping[int, tuple[RunStatus, Mapping[str, Any]]]:
        """Return status and run configuration of all runs."""
        ...

    def start(self, fab: Any, config: Mapping[str, Any]) -> int:
        """Start a run, and return its id."""
        ...

    def stop(self, run_id: int) -> None:
        """Stop a run at once."""
        ...


@dataclass
class RunRecovery:
    """Resume interrupted runs.

    Args:
        control: connection to the coordinator.
        state: state folder of the coordinator.
        runs: folder of the run folders.
        may_submit: function that returns whether a person may start runs at this moment.
        report: function that shows a line to the operator.
    """

    control: RunControl
    state: Path
    runs: Path
    may_submit: Callable[[str], bool] = lambda person: True
    report: Callable[[str], None] = say
    _found: set[int] = field(default_factory=set, init=False)  # runs that may have no file of a submission
    _was_disconnected: bool = field(default=True, init=False)
    _ended: set[int] = field(default_factory=set, init=False)
    _checked_at: dict[int, float] = field(default_factory=dict, init=False)
    _missing_since: dict[int, float] = field(default_factory=dict, init=False)

    def recover_all(self) -> None:
        """Resume all runs that were in progress. Call this before the SuperExec starts, so no run has a process."""
        for run_id, (status, _) in self.control.configs().items():
            if status.status == "pending":
                continue
            if not status.finished or _is_interrupted(status, max_age_s=MAX_AGE_S):
                self._recover(run_id)
            self._ended.add(run_id)

    def check(self) -> None:
        """Resume the runs that were interrupted since the last check."""
        try:
            if self._was_disconnected:  # a run may exist in the database only, because the SuperLink was killed
                self._found |= {run_id for run_id, (status, _) in self.control.configs().items() if not status.finished}
                self._was_disconnected = False
            for run_id in sorted((self._submitted() | self._found) - self._ended):
                self._check_run(run_id)
        except ConnectionProblem:  # the SuperLink is restarting
            self._was_disconnected = True

    def _check_run(self, run_id: int) -> None:
        now = time.monotonic()
        process = read_process(self.state, run_id)
        is_dead = process is not None and not is_alive(process)
        if process is not None and not is_dead:
            self._kill_if_hanging(run_id, process)
        if not is_dead and now - self._checked_at.get(run_id, 0.0) < STATUS_INTERVAL_S:
            return
        self._checked_at[run_id] = now
        status = self.control.status(run_id)
        if status.finished:
            if _is_interrupted(status):
                self._recover(run_id)
            self._ended.add(run_id)
        elif is_dead or (process is None and self._never_starts(run_id, status, now)):
            self._recover(run_id)

    def _never_starts(self, run_id: int, status: RunStatus, now: float) -> bool:
        """Return whether the process of a run died before it wrote its process id."""
        if status.status == "pending" or self._unknown_processes():
            self._missing_since.pop(run_id, None)
            return False
        return now - self._missing_since.setdefault(run_id, now) >= START_GRACE_S

    def _unknown_processes(self) -> set[int]:
        """Return the living processes of the SuperExec that belong to no known run."""
        try:
            content = json.loads((self.state / PROCESSES_FILE).read_text(encoding="utf-8"))
            started = {int(process) for process in content}
        except (OSError, ValueError, TypeError):
            return set()
        return {process for process in started - known_processes(self.state) if is_alive(process)}

    def _recover(self, run_id: int) -> None:
        """Start a run that continues an interrupted run, and stop the interrupted one."""
        configs = self.control.configs()
        status, config = configs.get(run_id, (RunStatus("finished"), {}))
        is_stopped = Submissions(self.state).is_stop_requested(run_id)
        is_continued = any(_request_in(other).get("continues") == run_id for _, other in configs.values())
        request = _request_in(config)
        settings = request.get("settings")
        is_dry_run = isinstance(settings, dict) and settings.get("dry_run") is True  # it has no rounds to save
        if request.get("do") in ("run", "resume") and not (is_stopped or is_continued or is_dry_run):
            self._continue_if_allowed(run_id, request, config)
        if not status.finished:  # after the start of the other run, so that its submitter always finds it
            self.control.stop(run_id)
        forget_process(self.state, run_id)
        self._ended.add(run_id)

    def _continue_if_allowed(self, run_id: int, request: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Continue a run, unless its person may not start runs any more, e.g. because the token was revoked."""
        person = str(config.get(PERSON_KEY, ""))
        if self.may_submit(person):
            return self._continue(run_id, request, config)
        name, who = (plain_line(text, max_length=200) for text in (str(request["folder"]), person))
        self.report(f"run {name} was interrupted; it does not resume, because {who} may not start runs any more")
        fields = {"run": str(config.get(NAME_KEY, "")), "number": str(run_id), "person": person, "folder": name}
        AuditLog(self.state).append("run.not_resumed", **fields, reason="the person may not start runs")

    def _continue(self, run_id: int, request: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        folder = self.runs / str(request["folder"])
        num_rounds = _num_rounds(folder)
        attempts = 1 + (int(request.get("attempts", 0)) if num_rounds == request.get("num_rounds") else 0)
        name = plain_line(str(request["folder"]), max_length=200)
        if attempts > MAX_ATTEMPTS:
            return self.report(f"run {name} was interrupted {attempts} times without a new round; it does not resume")
        repeated = dict(request)
        if request["do"] == "run" and (folder / DEPLOYMENT_FILE).exists():
            repeated = {"do": "resume", "overrides": [], **{key: request.get(key) for key in ("folder", "width")}}
        repeated |= {"continues": run_id, "attempts": attempts, "num_rounds": num_rounds}
        keys = {key: str(config.get(key, "")) for key in (PERSON_KEY, NAME_KEY)}
        self.control.start(build_app_bundle(), {REQUEST_KEY: json.dumps(repeated), **keys})
        self.report(f"run {name} was interrupted after {num_rounds} rounds; it resumes")

    def _kill_if_hanging(self, run_id: int, process: int) -> None:
        age = silence_s(self.state, run_id)
        if age > HANG_TIMEOUT_S:
            self.report(f"a run has not answered for {age:.0f} s; its process is killed")
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _submitted(self) -> set[int]:
        return {int(path.stem) for path in (self.state / SUBMISSIONS_FOLDER).glob("*.json") if path.stem.isdecimal()}


def _is_interrupted(status: RunStatus, *, max_age_s: float = float("inf")) -> bool:
    """Return whether a run has ended without an exit code, and without a person, within the last seconds."""
    is_recent = not status.finished_at or time.time() - status.finished_at < max_age_s
    return status.finished and parse_end(status) is None and status.sub_status != "stopped" and is_recent


def _request_in(config: Mapping[str, Any]) -> dict[str, Any]:
    return read_request(str(config.get(REQUEST_KEY)))


def _num_rounds(folder: Path) -> int:
    """Return the number of completed rounds of a run."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
