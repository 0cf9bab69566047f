"""Serve nodes, runs, files of runs and the history of a coordinator, to persons whose role allows it.

All requests are ``GET`` below `API_PREFIX`. The answer is JSON, or the bytes of a file.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fedlearn.core.version import VERSION
from fedlearn.deploy.audit_log import AuditLog, ReadLimit, RefusalLimit, read_events
from fedlearn.deploy.coordinator_side.ownership import owner_of
from fedlearn.deploy.coordinator_side.request_limits import (
    API_PREFIX,
    App,
    Receive,
    RequestRefused,
    Scope,
    Send,
    refuse,
)
from fedlearn.deploy.coordinator_side.run_audit import read_members
from fedlearn.deploy.coordinator_side.run_files import (
    RunFileError,
    find_folder,
    list_files,
    progress_values,
    read_chunks,
)
from fedlearn.deploy.coordinator_side.visibility import visible_events
from fedlearn.deploy.persons import Person, Persons, Role

MAX_EVENTS = 100_000  # lines of the audit log in an answer, the newest ones
Query = Mapping[str, str]


@dataclass(frozen=True)
class Route:
    """A request, the lowest role that may send it, and the function that returns the content of the response."""

    role: Role
    respond: Callable[[Person, Query], Any]
    is_logged: bool = False


class RunApi:
    """Answer the requests below `API_PREFIX`, and pass on all others.

    Args:
        app: the application that receives all other requests.
        persons: the persons who may call the coordinator.
        runs: folder of the run folders.
        state: state folder of the coordinator.
    """

    def __init__(self, app: App, *, persons: Persons, runs: Path, state: Path) -> None:
        self.app, self.persons, self.runs, self.state = app, persons, runs, state
        self.audit, self._limit, self._reads = AuditLog(state), RefusalLimit(), ReadLimit()
        self.routes = {
            "whoami": Route(Role.VIEWER, self._whoami),
            "nodes": Route(Role.VIEWER, lambda person, query: read_members(self.state)),
            "runs": Route(Role.VIEWER, self._runs),
            "history": Route(Role.VIEWER, self._history, is_logged=True),
            "files": Route(Role.SUBMITTER, self._files, is_logged=True),
            "file": Route(Role.SUBMITTER, self._file, is_logged=True),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, in the interface of ASGI."""
        if scope["type"] != "http" or not str(scope["path"]).startswith(API_PREFIX):
            return await self.app(scope, receive, send)
        name = str(scope["path"]).removeprefix(API_PREFIX)
        try:
            content = await asyncio.to_thread(self._answer, name, scope)
        except RequestRefused as refused:
            return await refuse(send, refused)
        if not isinstance(content, Iterator):
            return await _send(send, b"application/json", iter([json.dumps(content).encode()]))
        await _send(send, b"application/octet-stream", content)

    def _answer(self, name: str, scope: Scope) -> Any:
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        person, route = self.persons.find(headers), self.routes.get(name)
        if person is None:
            raise RequestRefused(401, "the token is missing or wrong")
        query = {key: values[0] for key, values in parse_qs(scope.get("query_string", b"").decode("latin-1")).items()}
        try:
            if route is None or scope.get("method") != "GET":
                raise RequestRefused(404, "this coordinator does not have this request")
            if not person.role.includes(route.role):
                raise RequestRefused(403, f"{person.name} has the role {person.role}, expected {route.role}")
            content = route.respond(person, query)
        except RequestRefused as refused:
            if self._limit.allows(person.name):
                self._log(person, name, query, event="request.refused", code=refused.status, reason=refused.reason)
            raise
        read = [os.path.normpath(query.get("folder", "")), query.get("path", "")]
        if route.is_logged and self._reads.allows(person.name, name, *read):
            self._log(person, name, query)
        return content

    def _log(self, person: Person, name: str, query: Query, *, event: str = "request", **fields: Any) -> None:
        what = {"request": name, "query": dict(query)}
        self.audit.append(event, person=person.name, role=str(person.role), **what, **fields)

    def _whoami(self, person: Person, query: Query) -> dict[str, str]:
        return {"name": person.name, "role": str(person.role), "version": VERSION}

    def _runs(self, person: Person, query: Query) -> dict[str, Any]:
        """Return the progress of each run in the query: ``folder`` has paths, one per line."""
        found = {}
        for name in query.get("folder", "").splitlines()[:1000]:
            try:
                found[name] = progress_values(find_folder(self.runs, name))
            except RunFileError:
                continue
        return found

    def _history(self, person: Person, query: Query) -> list[dict[str, Any]]:
        return visible_events(read_events(self.state)[-MAX_EVENTS:], person)

    def _files(self, person: Person, query: Query) -> list[dict[str, Any]]:
        return list_files(self._folder_of(person, query))

    def _file(self, person: Person, query: Query) -> Iterator[bytes]:
        try:
            return read_chunks(self._folder_of(person, query), query.get("path", ""))
        except RunFileError as error:
            raise RequestRefused(404, str(error)) from None

    def _folder_of(self, person: Person, query: Query) -> Path:
        """Return the run folder of a query, if the run belongs to the person or the person is an admin."""
        try:
            folder = find_folder(self.runs, query.get("folder", ""))
        except RunFileError as error:
            raise RequestRefused(404, str(error)) from None
        if not person.role.includes(Role.ADMIN) and owner_of(folder) != person.name:
            raise RequestRefused(403, f"the run is not a run of {person.name}; an admin may fetch it")
        return folder


async def _send(send: Send, kind: bytes, parts: Iterator[bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    while part := await asyncio.to_thread(next, parts, b""):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
