"""Persons read runs, files and the history by role; no path leaves a run, and no byte changes unnoticed."""

import asyncio
import hashlib
import json
import os

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

import httpx

from fedlearn.deploy import fetch, keys, remote_runs
from fedlearn.deploy.audit_log import AuditLog, read_events
from fedlearn.deploy.coordinator_side.app_bundle import PERSON_KEY
from fedlearn.deploy.coordinator_side.control_api import RunState
from fedlearn.deploy.coordinator_side.ownership import require_outside_runs, require_owner
from fedlearn.deploy.coordinator_side.run_api import RunApi
from fedlearn.deploy.coordinator_side.run_files import list_files, read_progress
from fedlearn.deploy.persons import Persons, add_person, revoke_person
from fedlearn.deploy.remote_runs import RemoteFile, RunClient, find_run
from fedlearn.errors import FedlearnError

pytestmark = pytest.mark.framework
FOLDER = "heart/fedavg/a"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("p") / "persons.json"
    roles = {"ada": "admin", "sam": "submitter", "sue": "submitter", "vic": "viewer"}
    return path, {name: add_person(path, name, role) for name, role in roles.items()}


@pytest.fixture
def place(tmp_path):
    """Return the folder of all runs, with a run of sam and a secret beside it."""
    run = tmp_path / "runs" / FOLDER
    (run / "model").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    contents = {"report.html": "<p>", "metrics.jsonl": '{"round": 2, "seconds": 3.0, "epsilon": 1.5}\n'}
    contents |= {"model/parameters.safetensors": "m" * 3_000_000, "config.yaml": "rounds: 12\n"}
    contents |= {"checkpoints/round_000001.safetensors": "c", ".lock": ""}
    contents |= {"deployment.json": json.dumps({"id": "20260301-1", "person": "sam"})}
    for name, text in contents.items():
        (run / name).write_text(text)
    (tmp_path / "secret").write_text("secret")
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "folder_link").symlink_to(tmp_path)
    os.mkfifo(run / "pipe")
    return tmp_path / "runs"


class Server:
    """The requests of `RunApi` without a network."""

    def __init__(self, place, state, persons, tokens):
        self.state, self.tokens, self.changed = state, {**tokens, "stranger": "guess"}, {}

        async def rest(scope, receive, send):
            raise AssertionError("the request was passed on")

        self.api = RunApi(rest, persons=Persons(persons), runs=place, state=state)

    def get(self, person, request, query="", method="GET"):
        """Return the status and the body of a response."""
        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {self.tokens[person]}".encode())]
        scope = {"type": "http", "path": f"/v1/fedlearn/{request}", "headers": headers, "method": method}
        asyncio.run(self.api({**scope, "query_string": query.encode()}, None, send))
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    def transport(self, person):
        def handle(request):
            status, body = self.get(person, request.url.path.rpartition("/")[2], request.url.query.decode())
            name = request.url.params.get("path", request.url.path.rpartition("/")[2])
            return httpx.Response(status, content=self.changed.get(name, lambda body: body)(body))

        return httpx.MockTransport(handle)


@pytest.fixture
def server(place, tmp_path, tokens):
    return Server(place, tmp_path / "state", *tokens)


READS = ["whoami", "nodes", f"runs?folder={FOLDER}", "history"]
FETCHES = [f"files?folder={FOLDER}", f"file?folder={FOLDER}&path=report.html"]
STATUS = {  # person -> status of a read, and of a request for files of a run of sam
    "ada": (200, 200),
    "sam": (200, 200),
    "sue": (200, 403),
    "vic": (200, 403),
    "stranger": (401, 401),
}


@pytest.mark.parametrize("request_text", [*READS, *FETCHES])
def test_each_request_is_answered_for_its_roles_only(server, request_text):
    assert {text.partition("?")[0] for text in [*READS, *FETCHES]} == server.api.routes.keys()
    name, _, query = request_text.partition("?")
    for person, statuses in STATUS.items():
        assert server.get(person, name, query)[0] == statuses[request_text in FETCHES], person
    refused = [line["person"] for line in read_events(server.state) if line["event"] == "request.refused"]
    assert refused == (["sue", "vic"] if request_text in FETCHES else [])


def test_a_fetched_file_is_in_the_audit_log_also_without_a_list_of_files(server):
    paths = ["report.html", "metrics.jsonl"]
    for path in paths:
        for _ in range(3):
            assert server.get("sam", "file", f"folder={FOLDER}&path={path}")[0] == 200
    lines = [line for line in read_events(server.state) if line["request"] == "file"]
    assert [(line["person"], line["query"]["path"]) for line in lines] == [("sam", path) for path in paths]


@pytest.mark.parametrize("name", ["history", f"files?folder={FOLDER}"])
def test_equal_reads_of_a_person_do_not_fill_the_disk(server, name):
    for number in range(9):
        request, _, query = name.partition("?")
        assert server.get("sam", request, f"{query}&other={number}")[0] == 200
    assert len(read_events(server.state)) == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD"])
def test_nothing_can_be_changed(server, method):
    assert server.get("ada", "files", f"folder={FOLDER}", method)[0] == 404
    assert server.get("ada", "others")[0] == 404


def test_the_list_has_files_for_the_submitter_only(place):
    names = {entry["path"] for entry in list_files(place / FOLDER)}
    assert names == {"report.html", "metrics.jsonl", "model/parameters.safetensors", "config.yaml"}


def test_a_run_above_other_runs_does_not_open_their_files(server, place):
    above = place / "heart"
    (above / "deployment.json").write_text(json.dumps({"id": "x", "person": "sue"}))
    (above / "own.txt").write_text("own")
    (above / "starting").mkdir()
    (above / "starting/config.yaml").write_text("rounds: 1")
    listed = json.loads(server.get("sue", "files", "folder=heart")[1])
    assert [entry["path"] for entry in listed] == ["own.txt"]
    for path in ("fedavg/a/report.html", "starting/config.yaml", "fedavg/a/model/parameters.safetensors"):
        assert server.get("sue", "file", str(httpx.QueryParams({"folder": "heart", "path": path})))[0] == 404


@pytest.mark.parametrize(
    ("folder", "is_free"), [("heart/fedavg/a/b", False), ("heart/fedavg/a/model/c", False), ("heart/x", True)]
)
def test_a_run_inside_of_another_run_is_refused(place, folder, is_free):
    if is_free:
        return require_outside_runs(place / folder, place)
    with pytest.raises(FedlearnError, match="is inside the folder of another run"):
        require_outside_runs(place / folder, place)


def test_a_folder_of_another_person_is_refused(place, tokens, monkeypatch):
    monkeypatch.setenv("FEDLEARN_PERSONS", str(tokens[0]))
    for person in ("sam", "ada", "coordinator", None):
        require_owner(place / FOLDER, person)
        require_owner(place / FOLDER / "model/parameters.safetensors", person)
    (place / "unknown").mkdir()
    for person, folder in (("sue", FOLDER), ("vic", FOLDER), ("", FOLDER), ("sam", "unknown"), ("sam", "none")):
        with pytest.raises(FedlearnError, match="is a run of another person"):
            require_owner(place / folder, person)


@pytest.mark.parametrize("do", ["run", "resume"])
def test_a_queued_request_of_a_person_who_may_start_no_runs_starts_none(place, tmp_path, monkeypatch, do):
    from fedlearn.deploy.coordinator_side import server_app

    path = tmp_path / "persons.json"
    for name, role in {"sam": "submitter", "vic": "viewer"}.items():
        add_person(path, name, role)
    revoke_person(path, "sam")
    monkeypatch.setenv("FEDLEARN_PERSONS", str(path))
    before = sorted(place.rglob("*"))
    for person in ("sam", "vic", "nobody"):
        request = {"do": do, "folder": FOLDER, "settings": {}, "overrides": [], "chosen": True, PERSON_KEY: person}
        with pytest.raises(FedlearnError, match="may not start runs any more"):
            server_app.execute(request, None, 7, place)
    assert sorted(place.rglob("*")) == before


MARK = "a value of a setting"
AUDIT_LINES = [  # (event, fields) of lines about a run of sam
    ("run.started", {"settings": {"scenario": {"name": "heart", "path": MARK}, MARK: 1}, "overrides": [f"x={MARK}"]}),
    ("run.ended", {"reason": MARK, "status": "done", "rounds": 3, "epsilon": 1.5}),
    ("request", {"query": {"folder": MARK}, "request": "files"}),
    ("request.refused", {"reason": MARK, "request": "start-run", "code": 400}),
    ("web.signed_in", {"address": MARK}),
    ("anything.new", {"future": {"field": MARK}}),
]


def test_settings_of_a_run_are_for_its_submitter_and_admins_in_each_answer(server, place):
    for event, fields in AUDIT_LINES:
        AuditLog(server.state).append(event, run="r1", person="sam", folder=FOLDER, **fields)
    (place / FOLDER / "config.yaml").write_text(f"rounds: 12\nkey: {MARK}\n")
    for text in [*READS, *FETCHES]:
        name, _, query = text.partition("?")
        for person in ("vic", "sue"):
            assert MARK.encode() not in server.get(person, name, query)[1], (person, text)
    for person in ("sam", "ada"):
        history = json.loads(server.get(person, "history")[1])
        assert [MARK in json.dumps(line) for line in history[: len(AUDIT_LINES)]] == [True] * len(AUDIT_LINES)
    seen = json.loads(server.get("vic", "history")[1])
    assert seen[0]["settings"] == {"scenario": {"name": "heart"}}
    assert (seen[1]["person"], seen[1]["rounds"], seen[1]["epsilon"]) == ("sam", 3, 1.5)


PATHS = [
    *("../../../secret", "../../../../secret", "/etc/hostname", "link", "folder_link/secret", "model/../report.html"),
    *(
        "checkpoints/round_000001.safetensors",
        "deployment.json",
        ".lock",
        "pipe",
        "",
        "model",
        "report.html\x00",
        "./report.html",
    ),
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leaves_the_files_of_a_run(server, path):
    query = httpx.QueryParams({"folder": FOLDER, "path": path})
    for person in ("ada", "sam"):
        assert server.get(person, "file", str(query))[0] == 404


@pytest.mark.parametrize("folder", ["", ".", "..", "../runs", "heart", "/etc", f"{FOLDER}/model", "x\x00", "a" * 5000])
def test_no_folder_but_a_run_folder_is_read(server, folder):
    query = str(httpx.QueryParams({"folder": folder, "path": "report.html"}))
    assert server.get("ada", "files", query)[0] == server.get("ada", "file", query)[0] == 404
    assert json.loads(server.get("ada", "runs", query)[1]) == {}


def test_the_progress_of_a_run_has_round_epsilon_and_predicted_end(place):
    progress = read_progress(place / FOLDER)
    assert (progress.round, progress.rounds, progress.epsilon, progress.seconds_left) == (2, 12, 1.5, 30.0)
    (place / FOLDER / "metrics.jsonl").write_text('{"round": "x"}\n[]\n{')
    (place / FOLDER / "config.yaml").write_text("[")
    assert read_progress(place / FOLDER).round == 0


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    keys.create(tmp_path / "keys", ["localhost"], [])
    built = RunClient("localhost:1", tmp_path / "keys/operator")
    built._client = httpx.Client(base_url="https://localhost:1/v1/fedlearn/", transport=server.transport("sam"))
    built.close = lambda: None
    run = RunState(7, "finished", "completed", 0, "", "", FOLDER, "", name="20260301-1", person="sam")
    monkeypatch.setattr(fetch, "list_runs", lambda address, keys: [run])
    monkeypatch.setattr(fetch, "RunClient", lambda address, keys: built)
    return built


def test_a_submitter_fetches_the_files_of_a_run(client, place, tmp_path, capsys):
    for number, name in enumerate(["20260301-1", "7", FOLDER, "2026"]):
        target = tmp_path / f"got{number}"
        assert fetch.main([name, "--to", str(target), "--json"]) == 0
        for entry in json.loads(capsys.readouterr().out)["files"]:
            data = (target / entry["path"]).read_bytes()
            assert data == (place / FOLDER / entry["path"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert not list(target.rglob(".*"))
    assert fetch.main(["7", "--to", str(target)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [lambda body: body + b"x", lambda body: body[:-1], lambda body: body.replace(b"<", b">")]
)
def test_a_changed_file_is_refused_and_not_kept(client, server, tmp_path, change, capsys):
    server.changed["report.html"] = change
    assert fetch.main(["7", "--to", str(tmp_path / "got")]) == 2
    assert "was changed in transit" in capsys.readouterr().err
    assert not (tmp_path / "got/report.html").exists()


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/x",
        "a/../../x",
        "..\\x",
        "C:\\x",
        "C:x",
        "a\x1b[2J",
        "",
        ".ssh/x",
        "a/.bashrc",
        "\u202ex",
        "a\nb",
        "//x/y",
    ],
)
def test_a_hostile_coordinator_cannot_name_a_path_outside(client, server, tmp_path, path):
    entry = {"path": path, "size": 1, "sha256": "0" * 64}
    server.changed["files"] = lambda body: json.dumps([entry]).encode()
    assert fetch.main(["7", "--to", str(tmp_path / "got")]) == 2
    assert not (tmp_path / "got").exists() or not [*(tmp_path / "got").iterdir()]


@pytest.mark.parametrize("size", [2**40, -1])
def test_a_run_that_is_too_large_is_refused_before_it_is_fetched(client, server, tmp_path, size, capsys):
    entry = {"path": "report.html", "size": size, "sha256": "0" * 64}
    server.changed["files"] = lambda body: json.dumps([entry]).encode()
    assert fetch.main(["7", "--to", str(tmp_path / "got")]) == 2
    assert "at most --max-gib=4" in capsys.readouterr().err


def test_a_file_that_is_longer_than_announced_ends_the_download(client, server, tmp_path):
    file = RemoteFile(path="report.html", size=3, sha256="0" * 64)
    server.changed["report.html"] = lambda body: b"x" * 10**7
    with pytest.raises(FedlearnError, match="was changed"):
        client.download(FOLDER, file, tmp_path / "got")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".got", "got"))]


def test_a_run_is_found_by_name_number_folder_or_the_start_of_a_name(capsys):
    runs = [RunState(n, "finished", "", 0, "", "", f"f{n % 2}", "", name=f"2026{n}-x") for n in (3, 2, 1)]
    assert [find_run(runs, text).id for text in ("20262-x", "2", "f1", "20261")] == [2, 2, 3, 1]
    for text in ("2026", "", "9", "\x1b[2J"):
        with pytest.raises(FedlearnError, match="no run is"):
            find_run(runs, text)


def test_the_history_at_the_coordinator_has_the_audit_log(client, server, monkeypatch, capsys):
    from fedlearn.deploy import history

    monkeypatch.setattr(history, "RunClient", lambda address, keys: client)
    AuditLog(server.state).append("run.started", run="r1", person="sam", settings={"scenario": {"name": "heart"}})
    assert history.main(["--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["person"], row["strategy"]) == ("r1", "sam", "heart")
    assert history.main(["--verify"]) == 2
    assert remote_runs.MAX_LISTED_FILES
