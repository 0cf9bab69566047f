"""Check the role of each control request, and write the request to the audit log.

`ControlAccess` stands between `RequestLimits`, which has read the body of a known sender, and Flower. Flower's Control
API has many requests, e.g. for apps from a hub. Only the requests of `LOWEST_ROLES` exist here. A request that starts a
run is written again with the app bundle of this coordinator, so no person can bring code.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedlearn.deploy.audit_log import AuditLog, ReadLimit, RefusalLimit
from fedlearn.deploy.coordinator_side.app_bundle import NAME_KEY, PERSON_KEY, REQUEST_KEY, build_app_bundle
from fedlearn.deploy.coordinator_side.request_limits import (
    CONTROL,
    App,
    Receive,
    RequestRefused,
    Scope,
    Send,
    refuse,
    replay,
)
from fedlearn.deploy.coordinator_side.run_requests import check_request, read_request
from fedlearn.deploy.coordinator_side.submissions import Submission, Submissions, new_run_name
from fedlearn.deploy.coordinator_side.visibility import visible_config
from fedlearn.deploy.persons import Person, Persons, Role
from fedlearn.flower.compat.control import (
    change_run_configs,
    read_run_id,
    read_start_run,
    read_started_run,
    write_start_run,
    write_started_run,
)

LOWEST_ROLES: Mapping[str, Role] = {  # request of Flower's Control API -> lowest role that may send it
    "list-runs": Role.VIEWER,
    "list-nodes": Role.VIEWER,
    "stream-logs": Role.VIEWER,
    "start-run": Role.SUBMITTER,
    "stop-run": Role.SUBMITTER,
    "register-node": Role.COORDINATOR,
    "unregister-node": Role.COORDINATOR,
}
READS = ("list-runs", "list-nodes", "stream-logs")


@dataclass(frozen=True)
class Call:
    """A control request of a person."""

    person: Person
    name: str
    body: bytes


class ControlAccess:
    """Pass on the control requests that the role of the person allows.

    Args:
        app: the application that receives all accepted requests, and the requests of nodes.
        persons: the persons who may call the coordinator.
        audit: the audit log of the coordinator.
        submissions: submissions of runs.
    """

    def __init__(self, app: App, *, persons: Persons, audit: AuditLog, submissions: Submissions) -> None:
        self.app, self.persons, self.audit, self.submissions = app, persons, audit, submissions
        self._bundle = build_app_bundle()
        self._limit = RefusalLimit()
        self._reads = ReadLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, in the interface of ASGI."""
        if scope["type"] != "http" or not str(scope["path"]).startswith(CONTROL):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        person = await asyncio.to_thread(self.persons.find, headers)
        if person is None:
            return await refuse(send, RequestRefused(401, "the token is missing or wrong"))
        call = Call(person, str(scope["path"]).removeprefix(CONTROL), (await receive()).get("body", b""))
        try:
            await asyncio.to_thread(self._check_role, call)
            if call.name == "start-run":
                return await self._start(call, scope, receive, send)
            await asyncio.to_thread(self._check_run, call)
        except RequestRefused as refused:
            await asyncio.to_thread(self._log_refusal, call, refused)
            return await refuse(send, refused)
        if call.name == "list-runs" and not call.person.role.includes(Role.ADMIN):
            return await self._list_runs(call, scope, receive, send)
        await self.app(scope, replay(call.body, receive), send)

    async def _list_runs(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the list of runs without the settings of other persons' runs."""
        runs = _Response(send)
        await self.app(scope, replay(call.body, receive), runs.keep)
        if runs.status == 200:
            runs.replace_body(change_run_configs(runs.body, partial(visible_config, person=call.person)))
        await runs.send()

    def _check_role(self, call: Call) -> None:
        lowest = LOWEST_ROLES.get(call.name)
        if lowest is None:
            raise RequestRefused(403, "this coordinator does not have this request")
        if not call.person.role.includes(lowest):
            raise RequestRefused(403, f"{call.person.name} has the role {call.person.role}, expected {lowest}")

    def _check_run(self, call: Call) -> None:
        """Check that the person may stop a run, and log the request."""
        if call.person.role == Role.COORDINATOR:
            return
        names = {"stop-run": "StopRun", "stream-logs": "StreamLogs"}
        number = _read(read_run_id, call.body, names[call.name]) if call.name in names else None
        if call.name == "stop-run":
            self.check_owner(call.person, number or 0)
        self._log(call, **({} if number is None else {"number": str(number)}))

    def check_owner(self, person: Person, number: int) -> None:
        """Refuse a person who is neither an admin nor the submitter of a run.

        Raises:
            RequestRefused: The run belongs to another person.
        """
        submission = self.submissions.find(number)
        if not person.role.includes(Role.ADMIN) and (submission is None or submission.person != person.name):
            raise RequestRefused(403, f"run {number} is not a run of {person.name}; an admin may stop it")

    async def _start(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        request, config = await asyncio.to_thread(self._read_start, call)
        if request["do"] == "stop":  # without a process of its own, which would take seconds to start
            return await self._stop_after_round(call, request, send)
        body = write_start_run(self._bundle, config)
        started = _Response(send)
        length = (b"content-length", b"%d" % len(body))
        headers = [header for header in scope["headers"] if header[0].lower() != b"content-length"]
        await self.app({**scope, "headers": [*headers, length]}, replay(body, receive), started.keep)
        number = read_started_run(started.body) if started.status == 200 else None
        await asyncio.to_thread(self._record_start, call, request, config, number)
        await started.send()

    async def _stop_after_round(self, call: Call, request: Mapping[str, Any], send: Send) -> None:
        number = request.get("run")
        if type(number) is not int or self.submissions.find(number) is None:
            raise RequestRefused(404, "no run has this number")
        await asyncio.to_thread(self.submissions.request_stop, number)
        await asyncio.to_thread(self._log, call, do="stop", number=str(number))
        body = write_started_run(number)
        headers = [(b"content-type", b"application/protobuf"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _read_start(self, call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the request in a call that starts a run, and the run configuration with the name of the person."""
        _, config = _read(read_start_run, call.body)
        request = read_request(str(config.get(REQUEST_KEY)))
        _read(partial(check_request, is_coordinator=call.person.role == Role.COORDINATOR), request)
        do = request["do"]
        if do == "stop":
            self.check_owner(call.person, int(request["run"]) if type(request.get("run")) is int else 0)
        person, name = call.person.name, new_run_name() if do == "run" else ""
        if call.person.role == Role.COORDINATOR:  # it starts a run again for a person
            person, name = str(config.get(PERSON_KEY) or person), str(config.get(NAME_KEY) or name)
        return request, {REQUEST_KEY: str(config[REQUEST_KEY]), PERSON_KEY: person, NAME_KEY: name}

    def _record_start(
        self, call: Call, request: Mapping[str, Any], config: Mapping[str, Any], number: int | None
    ) -> None:
        do, folder = str(request["do"]), str(request.get("folder", ""))
        fields = {"do": do, "number": str(number or ""), "run": config[NAME_KEY], "folder": folder}
        if number is not None:
            person = str(config[PERSON_KEY])
            self.submissions.add(Submission(number=number, name=fields["run"], person=person, do=do, folder=folder))
        digest = hashlib.sha256(str(config[REQUEST_KEY]).encode()).hexdigest()
        self._log(call, **fields, request_sha256=digest, accepted=number is not None)

    def _log(self, call: Call, **fields: Any) -> None:
        """Write a request to the audit log. Equal reads and stops within ten minutes are one line."""
        is_repeatable = call.name in READS or call.name == "stop-run" or fields.get("do") == "stop"
        if is_repeatable and not self._reads.allows(call.person.name, call.name, *map(str, fields.values())):
            return
        self.audit.append("request", person=call.person.name, role=str(call.person.role), request=call.name, **fields)

    def _log_refusal(self, call: Call, refused: RequestRefused) -> None:
        if not self._limit.allows(call.person.name):
            return
        fields = {"request": call.name, "code": refused.status, "reason": refused.reason}
        self.audit.append("request.refused", person=call.person.name, role=str(call.person.role), **fields)


class _Response:
    """A response that is sent only after it was read."""

    def __init__(self, send: Send) -> None:
        self._send, self._messages = send, list[MutableMapping[str, Any]]()

    async def keep(self, message: MutableMapping[str, Any]) -> None:
        self._messages.append(message)

    @property
    def status(self) -> int:
        return next((int(message["status"]) for message in self._messages if "status" in message), 0)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self._messages)

    def replace_body(self, body: bytes) -> None:
        start = next(message for message in self._messages if "status" in message)
        headers = [header for header in start.get("headers", ()) if header[0].lower() != b"content-length"]
        start = {**start, "headers": [*headers, (b"content-length", b"%d" % len(body))]}
        self._messages = [start, {"type": "http.response.body", "body": body}]

    async def send(self) -> None:
        for message in self._messages:
            await self._send(message)


def _read(function: Any, *arguments: Any) -> Any:
    """Return the result of a function that reads a body; a malformed body is refused."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise RequestRefused(400, str(error)) from None
