"""The application is read-only, answers its own names and users only, and signs persons in."""

import asyncio
import json

import pytest
from run_folders import HOSTILE, RunFolder, line
from starlette.testclient import TestClient

from fedlearn.web import app as web_app
from fedlearn.web import security
from fedlearn.web.app import COOKIE, build_app, build_metrics_app
from fedlearn.web.feed import Feed
from fedlearn.web.server import LOOPBACK, PortError, listen
from fedlearn.web.sign_in import MAX_FAILED, MAX_FAILED_TOTAL, SESSION_S, Attempts, Sessions
from fedlearn.web.sources import FolderSource, NodeView, Snapshot

HOST = "coordinator.example:8443"


class People:
    """Two persons; ``active`` holds the names that may still read."""

    def __init__(self):
        self.active = {"ana", "ben"}
        self.log = []

    def record(self, person, address):
        self.log.append(person)

    def check(self, token):
        return next((name for name in sorted(self.active) if token == f"secret of {name}"), None)

    def is_active(self, person):
        return person in self.active

    def may_open_report(self, person, key):
        return person == "ana"


@pytest.fixture
def folder(tmp_path):
    RunFolder(tmp_path / "run").add(line(1)).end()
    (tmp_path / "run/report.html").write_text("<script>alert(1)</script><p>report")
    return tmp_path


def client(folder, people=None, **options):
    """Return a browser without pictures and scripts."""
    app = build_app(FolderSource(folder), hosts=[HOST], accounts=people)
    return TestClient(app, base_url=f"https://{HOST}", follow_redirects=False, **options)


def sign_in(browser, name="ana", secret=None, **options):
    form = {"token": f"secret of {name}" if secret is None else secret}
    return browser.post("/sign-in", data=form, **options)


PATHS = ["/", "/page.js", "/page.css", "/icon.svg", "/report?run=run", "/report?run=none", "/nothing", "/events"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", ["evil.example", "coordinator.example", f"{HOST}.evil.example", "127.0.0.1:1", ""])
def test_another_name_of_the_server_is_refused_everywhere(folder, path, host):
    response = client(folder).get(path, headers={"host": host})
    assert (response.status_code, b"fedlearn" in response.content) == (421, False)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "POST"])
@pytest.mark.parametrize("path", ["/", "/report?run=run", "/events"])
def test_no_request_changes_anything(folder, method, path):
    assert client(folder).request(method, path).status_code == 405


@pytest.mark.parametrize("path", [*PATHS[:-1], "/sign-in"])
def test_each_response_forbids_other_code_frames_and_caches(folder, path):
    headers = client(folder).get(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy.get("script-src", "'none'") in ("'self'", "'none'")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"


def test_a_report_runs_no_script_and_has_no_rights_of_the_site(folder):
    response = client(folder).get("/report?run=run")
    assert b"<p>report" in response.content
    policy = response.headers["content-security-policy"]
    assert "sandbox allow-popups" in policy
    assert "script" not in policy
    assert client(folder).get("/report", params={"run": "../run"}).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),  # a link from another page
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": f"https://{HOST}"}, 200),
    ],
)
def test_other_sites_read_nothing(folder, headers, status):
    assert client(folder).get("/", headers=headers).status_code == status


def test_another_site_cannot_sign_a_person_in(folder):
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}):
        assert sign_in(client(folder, People()), headers=headers).status_code == 403


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("/", "/page.css", "/icon.svg", "/nothing")])
def test_a_stranger_sees_nothing_but_the_form(folder, path):
    browser = client(folder, People())
    assert b"Sign in" in browser.get("/").content
    assert b"page.js" not in browser.get("/").content
    assert browser.get(path).status_code == 401
    browser.cookies.set(COOKIE, "guess")
    assert browser.get(path).status_code == 401


def test_a_person_signs_in_and_out(folder):
    browser = client(folder, People())
    response = sign_in(browser)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    flags = {part.strip().lower() for part in response.headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "secure", "samesite=strict", "path=/"} <= flags
    assert not any(flag.startswith("domain") for flag in flags)
    assert b"page.js" in browser.get("/").content
    assert browser.get("/report?run=run").status_code == 200
    cookie = browser.cookies[COOKIE]
    browser.post("/sign-out")
    browser.cookies.set(COOKIE, cookie)
    assert browser.get("/report?run=run").status_code == 401


def test_a_person_without_rights_is_signed_out_at_once(folder):
    people = People()
    browser = client(folder, people)
    sign_in(browser)
    people.active.discard("ana")
    assert browser.get("/report?run=run").status_code == 401
    people.active.add("ana")
    assert browser.get("/report?run=run").status_code == 401  # the session has ended


@pytest.mark.parametrize("secret", ["", "guess", "secret of", HOSTILE, "x" * 10_000, "\0"])
def test_a_wrong_secret_opens_no_session_and_is_not_shown(folder, secret):
    browser = client(folder, People())
    response = sign_in(browser, secret=secret)
    assert response.headers["location"] == "/?failed"
    assert "set-cookie" not in response.headers
    page = browser.get("/?failed").text
    assert "The token is wrong." in page
    assert not secret or secret not in page


def test_a_body_with_many_fields_or_another_type_opens_no_session(folder):
    browser = client(folder, People())
    for body in (b"&".join([b"a=1"] * 1000), b"\xff" * 100, json.dumps({"token": "secret of ana"}).encode()):
        assert browser.post("/sign-in", content=body).headers["location"] == "/?failed"


def test_a_slow_body_ends_its_request(folder, monkeypatch):
    monkeypatch.setattr(web_app, "FORM_TIMEOUT_S", 0.05)

    async def request():
        head = [(b"host", HOST.encode())]
        scope = {"type": "http", "method": "POST", "path": "/sign-in", "query_string": b"", "headers": head}
        sent = []

        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        await build_app(FolderSource(folder), hosts=[HOST], accounts=People())(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(asyncio.wait_for(request(), 30)) == 303


def test_a_report_is_for_persons_who_may_open_it(folder):
    codes = {}
    for name in ("ana", "ben"):
        browser = client(folder, People())
        sign_in(browser, name)
        response = browser.get("/report?run=run")
        codes[name] = response.status_code
        assert (b"<p>report" in response.content) == (name == "ana")
    assert codes == {"ana": 200, "ben": 403}


def test_guesses_are_limited_by_address_and_in_total(folder):
    browser = client(folder, People())
    codes = [sign_in(browser, secret="wrong").status_code for _ in range(MAX_FAILED + 2)]
    assert codes == [303] * MAX_FAILED + [429] * 2
    assert sign_in(browser).status_code == 429  # also with the right secret
    assert sign_in(client(folder, People(), client=("10.0.0.2", 1))).status_code == 303
    attempts = Attempts(clock=lambda: 0.0)
    for number in range(MAX_FAILED_TOTAL):
        assert not attempts.is_limited(f"10.0.1.{number}")
        attempts.count(f"10.0.1.{number}")
    assert attempts.is_limited("10.0.2.1")


def test_metrics_need_the_token_of_a_person(folder):
    app = build_app(FolderSource(folder), hosts=[HOST], accounts=People(), metrics=lambda: b"fedlearn_x 1\n")
    browser = TestClient(app, base_url=f"https://{HOST}")
    for header in ("", "Bearer", "Bearer guess", "Basic secret of ana", "secret of ana"):
        assert browser.get("/metrics", headers={"authorization": header}).status_code == 401
    assert browser.get("/metrics", headers={"authorization": "Bearer secret of ana"}).content == b"fedlearn_x 1\n"
    codes = [browser.get("/metrics", headers={"authorization": "Bearer guess"}).status_code for _ in range(9)]
    assert codes[-1] == 429


def test_metrics_on_loopback_answer_their_own_name_only():
    app = build_metrics_app(lambda: b"fedlearn_x 1\n", hosts=[HOST])
    assert TestClient(app, base_url=f"http://{HOST}").get("/metrics").content == b"fedlearn_x 1\n"
    assert TestClient(app, base_url="http://evil.example").get("/metrics").status_code == 421


def test_a_limit_ends_after_its_window_and_a_success_forgets_failures():
    now = [0.0]
    attempts = Attempts(clock=lambda: now[0])
    for _ in range(MAX_FAILED):
        attempts.count("a")
    assert attempts.is_limited("a")
    now[0] = 61.0
    assert not attempts.is_limited("a")
    attempts.count("a")
    attempts.forget("a")
    assert not attempts._failed
    assert not attempts._all


def test_a_session_ends_and_its_secret_is_not_kept():
    now = [0.0]
    sessions = Sessions(People(), clock=lambda: now[0])
    secret = sessions.start("ana")
    assert sessions.person(secret) == "ana"
    assert secret not in repr(sessions)
    now[0] = SESSION_S + 1
    assert sessions.person(secret) is None
    now[0] = 0.0
    assert sessions.person(secret) is None


class Changing:
    """A source whose snapshots a test sets."""

    def __init__(self, *titles):
        self.titles = list(titles)
        self.num_reads = 0

    def snapshot(self):
        self.num_reads += 1
        title = self.titles[0] if len(self.titles) == 1 else self.titles.pop(0)
        if title is None:
            raise OSError("unreadable")
        return Snapshot(title=title, runs=[], num_runs=0, nodes=[NodeView(name=HOSTILE, state="online")])

    def detail(self, key):
        return None

    def report(self, key):
        return b""


def collect(source, number, is_active=lambda: True):
    async def read():
        feed, titles = Feed(source, interval_s=0.001), []
        events = feed.events("", is_active)
        async for event in events:
            if event.startswith("event: state"):
                titles.append(json.loads(event.split("data: ", 1)[1])["title"])
            if len(titles) == number:
                break
        await events.aclose()
        await asyncio.sleep(0.02)
        return titles, feed

    return asyncio.run(asyncio.wait_for(read(), 60))


def test_events_have_each_change_once_and_an_unreadable_source_stops_nothing():
    source = Changing("a", "a", None, "b", "b", "c")
    titles, feed = collect(source, 3)
    assert titles == ["a", "b", "c"]
    assert feed.num_readers == 0
    assert feed._task.done()  # without a reader the source is not read


def test_events_end_with_the_rights_of_the_reader():
    answers = iter([True, True, False])
    titles, _ = collect(Changing("a", "b", "c", "d"), 9, lambda: next(answers))
    assert len(titles) < 3


def test_a_hostile_name_cannot_end_an_event():
    source = Changing("a\n\nevent: run\ndata: {}\n\n")
    titles, _ = collect(source, 1)
    assert titles == ["a\n\nevent: run\ndata: {}\n\n"]


def test_open_pages_are_limited(folder, monkeypatch):
    monkeypatch.setattr(web_app, "MAX_READERS", 0)
    assert client(folder).get("/events").status_code == 503


def test_another_user_of_the_machine_is_refused(folder, tmp_path, monkeypatch):
    table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
    row = "   0: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000 {uid} 0 1\n"
    monkeypatch.setattr(security, "TCP_FILE", tmp_path / "tcp")
    monkeypatch.setattr("os.getuid", lambda: 1000)
    monkeypatch.setattr("sys.platform", "linux")
    ends = ("127.0.0.1", 0xC350), ("127.0.0.1", 0x1F90)
    for uid, accepted in ((1000, True), (0, True), (1001, False)):
        (tmp_path / "tcp").write_text(table + row.format(uid=uid))
        assert security.is_same_user(*ends) is accepted
    assert not security.is_same_user(*ends[::-1])  # no such connection
    assert not security.is_same_user(None, ends[1])
    app = build_app(FolderSource(folder), hosts=["127.0.0.1:8080"], same_user=True)
    for uid, status in ((1000, 200), (1001, 403)):
        (tmp_path / "tcp").write_text(table + row.format(uid=uid))
        assert TestClient(app, base_url="http://127.0.0.1:8080", client=ends[0]).get("/").status_code == status


def test_a_taken_or_impossible_port_is_named():
    with listen(LOOPBACK, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=rf"--port {port} cannot be used"):
            listen(LOOPBACK, port)
    for port in (-1, 65536):
        with pytest.raises(PortError, match=f"--port is {port}"):
            listen(LOOPBACK, port)
