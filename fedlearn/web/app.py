"""Build the web application: one page, its events, and the reports of runs. All of it is read-only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from fedlearn.web.feed import INTERVAL_S, MAX_READERS, Feed
from fedlearn.web.security import App, RequestGuard, report_headers
from fedlearn.web.sign_in import WINDOW_S, Accounts, Attempts, Sessions
from fedlearn.web.sources import Source

STATIC = Path(__file__).parent / "static"
FILES = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
SIGN_IN_FILES = ("page.css", "icon.svg")  # files for persons who have not signed in
MAX_FORM_BYTES, FORM_TIMEOUT_S = 4096, 10.0
COOKIE = "__Host-fedlearn"  # with this prefix browsers require TLS, the path / and no other domain
SIGN_OUT_FORM = '<form method="post" action="/sign-out"><button>Sign out</button></form>'
FAILED_NOTE = '<p class="warning" role="alert">The token is wrong.</p>'
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass
class Site:
    """The endpoints of the page.

    Args:
        source: nodes and runs.
        accounts: persons who may read the page; None lets each accepted connection read it.
        interval_s: seconds between two looks at the source.
        metrics: returns numbers in the format of Prometheus; None for a page without ``/metrics``.
    """

    source: Source
    accounts: Accounts | None = None
    interval_s: float = INTERVAL_S
    metrics: Callable[[], bytes] | None = None
    attempts: Attempts = field(default_factory=Attempts)
    feed: Feed = field(init=False)
    sessions: Sessions | None = field(init=False)

    def __post_init__(self) -> None:
        self.feed = Feed(self.source, self.interval_s)
        self.sessions = Sessions(self.accounts) if self.accounts else None

    def routes(self) -> list[Route]:
        """Return all addresses of the page."""
        routes = [
            Route("/", self._page),
            Route("/events", self._private(self._events)),
            Route("/report", self._private(self._report)),
            *(Route(f"/{name}", self._file(name)) for name in FILES),
        ]
        signing = [
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
        ]
        measured = [Route("/metrics", self._metrics)] if self.metrics else []
        return [*routes, *measured, *(signing if self.sessions else [])]

    def person(self, request: Request) -> str | None:
        """Return the person who reads the page; empty without accounts, None for a stranger."""
        if self.sessions is None:
            return ""
        return self.sessions.person(request.cookies.get(COOKIE, ""))

    def _private(self, endpoint: Endpoint) -> Endpoint:
        async def check(request: Request) -> Response:
            if self.person(request) is None:
                return PlainTextResponse("Sign in first.\n", status_code=401)
            return await endpoint(request)

        return check

    async def _page(self, request: Request) -> Response:
        if self.person(request) is None:
            note = FAILED_NOTE if "failed" in request.query_params else ""
            return HTMLResponse(_fill("sign_in.html", note))
        return HTMLResponse(_fill("page.html", SIGN_OUT_FORM if self.sessions else ""))

    def _file(self, name: str) -> Endpoint:
        async def send(request: Request) -> Response:
            return FileResponse(STATIC / name, media_type=FILES[name])

        return send if name in SIGN_IN_FILES else self._private(send)

    async def _events(self, request: Request) -> Response:
        if self.feed.num_readers >= MAX_READERS:
            return PlainTextResponse("Too many pages are open.\n", status_code=503, headers={"retry-after": "30"})
        events = self.feed.events(request.query_params.get("run", ""), lambda: self.person(request) is not None)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _report(self, request: Request) -> Response:
        key = request.query_params.get("run", "")
        if self.accounts and not await asyncio.to_thread(
            self.accounts.may_open_report, self.person(request) or "", key
        ):
            text = "The report of a run is for its submitter and for admins, because it has all settings.\n"
            return PlainTextResponse(text, status_code=403)
        page = await self.feed.report(key)
        if not page:
            return PlainTextResponse("This run has no report.\n", status_code=404)
        return Response(page, media_type="text/html", headers=dict(report_headers()))

    async def _sign_in(self, request: Request) -> Response:
        assert self.accounts is not None
        assert self.sessions is not None
        person = await self._check(request, await _read_token(request))
        if not isinstance(person, str):
            return person or RedirectResponse("/?failed", status_code=303)
        await asyncio.to_thread(self.accounts.record, person, request.client.host if request.client else "")
        response = RedirectResponse("/", status_code=303)
        cookie = self.sessions.start(person)
        response.set_cookie(COOKIE, cookie, path="/", secure=True, httponly=True, samesite="strict")
        return response

    async def _check(self, request: Request, token: str) -> str | Response | None:
        """Return the person with a token, None for a wrong token, or a response after too many attempts."""
        assert self.accounts is not None
        address = request.client.host if request.client else ""
        if self.attempts.is_limited(address):
            text = f"Too many attempts. Try again in {WINDOW_S:.0f} seconds.\n"
            return PlainTextResponse(text, status_code=429, headers={"retry-after": f"{WINDOW_S:.0f}"})
        self.attempts.count(address)
        person = await asyncio.to_thread(self.accounts.check, token)
        if person is None:
            await asyncio.to_thread(self.accounts.record, None, address)
        else:
            self.attempts.forget(address)
        return person

    async def _metrics(self, request: Request) -> Response:
        assert self.metrics is not None
        if self.person(request) is None:
            kind, _, token = request.headers.get("authorization", "").partition(" ")
            person = await self._check(request, token.strip()) if kind.lower() == "bearer" else None
            if not isinstance(person, str):
                return person or PlainTextResponse("A token of a person is missing or wrong.\n", status_code=401)
        return Response(await asyncio.to_thread(self.metrics), media_type=METRICS_TYPE)

    async def _sign_out(self, request: Request) -> Response:
        assert self.sessions is not None
        self.sessions.end(request.cookies.get(COOKIE, ""))
        response = RedirectResponse("/", status_code=303)
        response.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
        return response


def _fill(name: str, part: str) -> str:
    """Return a page with a fixed part at its mark. No text of another party gets into a page this way."""
    return (STATIC / name).read_text(encoding="utf-8").replace("<!-- part -->", part)


async def _read_token(request: Request) -> str:
    """Return the token of the form; empty for another, a longer or a slow body."""
    body = b""
    try:
        async with asyncio.timeout(FORM_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_FORM_BYTES:
                    return ""
    except TimeoutError:
        return ""
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=4)
    except ValueError:
        return ""
    return fields.get("token", [""])[0].strip()


def build_app(
    source: Source,
    *,
    hosts: Collection[str],
    accounts: Accounts | None = None,
    same_user: bool = False,
    interval_s: float = INTERVAL_S,
    metrics: Callable[[], bytes] | None = None,
) -> App:
    """Return the ASGI application of the page.

    Args:
        source: nodes and runs.
        hosts: accepted values of the header ``Host``, see `fedlearn.web.security.accepted_hosts`.
        accounts: persons who may read the page; None lets each accepted connection read it. Sessions need TLS.
        same_user: True accepts only connections of the user of this process.
        interval_s: seconds between two looks at the source, > 0.
        metrics: returns numbers in the format of Prometheus; None for a page without ``/metrics``. A program shows the
            token of a person (``authorization: Bearer TOKEN``).
    """
    site = Site(source, accounts, interval_s, metrics)
    return RequestGuard(Starlette(routes=site.routes()), hosts=hosts, same_user=same_user)


def build_metrics_app(metrics: Callable[[], bytes], *, hosts: Collection[str]) -> App:
    """Return the ASGI application of ``/metrics`` alone, without a sign-in. It must listen on loopback only.

    Args:
        metrics: returns numbers in the format of Prometheus.
        hosts: accepted values of the header ``Host``.
    """

    async def send(request: Request) -> Response:
        return Response(await asyncio.to_thread(metrics), media_type=METRICS_TYPE)

    return RequestGuard(Starlette(routes=[Route("/metrics", send)]), hosts=hosts)
