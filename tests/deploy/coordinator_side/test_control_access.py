"""Each control request is accepted for some roles only, and is in the audit log with the person."""

import asyncio
import json
import signal
import threading
from functools import cache
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.proto import control_pb2

from fedlearn.deploy.audit_log import AuditLog, RefusalLimit, read_events, verify
from fedlearn.deploy.coordinator_side.app_bundle import NAME_KEY, PERSON_KEY, build_app_bundle
from fedlearn.deploy.coordinator_side.control_access import LOWEST_ROLES, ControlAccess
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.coordinator_side.submissions import Submission, Submissions, stoppable
from fedlearn.deploy.persons import Persons, Role, add_person, token_digest
from fedlearn.flower.compat.control import ControlClient, read_start_run, write_start_run

pytestmark = pytest.mark.framework
build_app_bundle = cache(build_app_bundle)
RUN = {"do": "run", "settings": {"scenario": {"name": "heart"}}, "folder": "heart/x", "chosen": True}


class Coordinator:
    """The checks of a coordinator, in front of an application that records its requests."""

    def __init__(self, folder, persons, tokens):
        self.folder, self.received, self.status, self.answer, self.sent = folder, [], 200, b"", []
        self.tokens = {**tokens, "coordinator": "local", "stranger": "guess", "nobody": ""}
        self.persons = Persons(persons, token_digest(b"local"))
        self.access = ControlAccess(
            self._app, persons=self.persons, audit=AuditLog(folder), submissions=Submissions(folder)
        )

    async def _app(self, scope, receive, send):
        message = await receive()
        self.received.append((scope["path"], message["body"]))
        body = self.answer or control_pb2.StartRunResponse(run_id=77).SerializeToString()
        body = body if self.status == 200 else b"{}"
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def call(self, person, request, body=b""):
        """Send a request, and return the status of the response."""
        sent = []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        token = f"Bearer {self.tokens[person]}".encode()
        scope = {"type": "http", "path": request, "headers": [(b"Authorization", token)]}
        asyncio.run(self.access(scope, receive, send))
        self.sent = sent
        return sent[0]["status"]

    def start(self, caller, request=RUN, bundle=None, **config):
        body = write_start_run(bundle or build_app_bundle(), {"request": json.dumps(request), **config})
        return self.call(caller, "/v1/control/start-run", body)

    def stop(self, name, number):
        return self.call(name, "/v1/control/stop-run", control_pb2.StopRunRequest(run_id=number).SerializeToString())

    @property
    def events(self):
        return read_events(self.folder)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("p") / "persons.json"
    roles = {"ada": "admin", "sam": "submitter", "sue": "submitter", "vic": "viewer"}
    return path, {name: add_person(path, name, role) for name, role in roles.items()}


@pytest.fixture
def coordinator(tmp_path, tokens):
    return Coordinator(tmp_path, *tokens)


ROLE_OF = {"vic": Role.VIEWER, "sam": Role.SUBMITTER, "ada": Role.ADMIN, "coordinator": Role.COORDINATOR}


def bodies(request):
    message = control_pb2.StopRunRequest(run_id=77) if request == "stop-run" else control_pb2.ListNodesRequest()
    start = write_start_run(build_app_bundle(), {"request": json.dumps(RUN)})
    return start if request == "start-run" else message.SerializeToString()


@pytest.mark.parametrize("request_name", LOWEST_ROLES)
def test_each_request_is_accepted_for_its_roles_only_and_is_logged(coordinator, request_name):
    Submissions(coordinator.folder).add(Submission(number=77, name="r", person="sam", do="run", folder="f"))
    expected = []
    for name in [*ROLE_OF, "stranger", "nobody"]:
        coordinator.received.clear()
        is_allowed = name in ROLE_OF and ROLE_OF[name].includes(LOWEST_ROLES[request_name])
        status = coordinator.call(name, f"/v1/control/{request_name}", bodies(request_name))
        assert status == (200 if is_allowed else 403 if name in ROLE_OF else 401)
        assert len(coordinator.received) == is_allowed
        if name in ROLE_OF and (name != "coordinator" or request_name == "start-run"):
            expected.append(("request" if is_allowed else "request.refused", name, request_name))
    assert [(line["event"], line["person"], line["request"]) for line in coordinator.events] == expected


def test_a_list_of_runs_has_the_settings_of_the_persons_runs_only(coordinator):
    mark = "a value of a setting"
    settings = {"scenario": {"name": "heart", "path": mark}, "strategy": {"name": "fedavg"}, mark: mark}
    request = {**RUN, "settings": settings, "overrides": [mark], "rerun_command": mark, "continues": 3}
    runs = control_pb2.ListRunsResponse(now="now")
    for number, person in ((1, "sam"), (2, "sue")):
        config = {"request": json.dumps(request), PERSON_KEY: person, NAME_KEY: "r"}
        body = write_start_run(build_app_bundle(), config)
        started = control_pb2.StartRunRequest.FromString(body)
        for name, value in started.override_config.items():
            runs.run_dict[number].override_config[name].CopyFrom(value)
    coordinator.answer = runs.SerializeToString()
    shown = {}
    for person in ROLE_OF:
        coordinator.call(person, "/v1/control/list-runs")
        listed = control_pb2.ListRunsResponse.FromString(coordinator.sent[1]["body"]).run_dict
        configs = {number: ControlClient.config_of(run) for number, run in listed.items()}
        shown[person] = [number for number, config in sorted(configs.items()) if mark in config["request"]]
        assert {config[PERSON_KEY] for config in configs.values()} == {"sam", "sue"}
        assert all(json.loads(config["request"])["continues"] == 3 for config in configs.values())
        assert all(json.loads(c["request"])["settings"]["strategy"]["name"] == "fedavg" for c in configs.values())
        lengths = [int(value) for name, value in coordinator.sent[0]["headers"] if name == b"content-length"]
        assert lengths in ([], [len(coordinator.sent[1]["body"])])
    assert shown == {"vic": [], "sam": [1], "ada": [1, 2], "coordinator": [1, 2]}


def all_control_requests():
    from flwr.supercore.protobuf import translation

    tables = [value for value in vars(translation).values() if isinstance(value, dict)]
    keys = {key for table in tables for key in table if isinstance(key, tuple) and len(key) == 2}
    return sorted({path for _, path in keys if str(path).startswith("/v1/control/")})


@pytest.mark.slow
def test_no_other_request_of_flower_s_control_api_exists(coordinator):
    others = [path for path in all_control_requests() if path.removeprefix("/v1/control/") not in LOWEST_ROLES]
    assert len(others) > 20
    for path in [
        *others,
        "/v1/control/",
        "/v1/control/list-runs/",
        "/v1/control/../control/x",
        "/v1/control/LIST-RUNS",
    ]:
        assert coordinator.call("coordinator", path) == 403, path
    for name in ROLE_OF:
        assert coordinator.call(name, others[0]) == 403
    assert coordinator.received == []


def test_a_run_gets_the_name_of_its_person_and_no_other(coordinator):
    assert coordinator.start("sam", person="ada", name="mine") == 200
    ((_, body),) = coordinator.received
    _, config = read_start_run(body)
    assert config["person"] == "sam"
    assert config["name"] not in ("", "mine")
    assert json.loads(config["request"]) == RUN
    assert Submissions(coordinator.folder).find(77).person == "sam"
    (line,) = coordinator.events
    assert (line["person"], line["run"], line["number"], line["folder"]) == ("sam", config["name"], "77", "heart/x")
    assert verify(coordinator.folder).problems == ()


def test_the_coordinator_starts_a_run_again_for_its_person(coordinator):
    assert coordinator.start("coordinator", {**RUN, "do": "resume"}, person="sam", name="r1") == 200
    assert read_start_run(coordinator.received[0][1])[1]["person"] == "sam"


def test_a_person_cannot_bring_code_in_an_app(coordinator):
    current = build_app_bundle()
    other = type(current)(current.hash_str, current.content + b"x", {})
    assert coordinator.start("ada", bundle=other) == 200
    assert read_start_run(coordinator.received[0][1])[0] == current.content


def test_all_other_fields_of_a_start_are_removed(coordinator):
    body = write_start_run(build_app_bundle(), {"request": json.dumps(RUN)})
    message = control_pb2.StartRunRequest.FromString(body)
    message.app_spec, message.federation, message.user_prompt = "@evil/app", "@other/federation", "do this"
    assert coordinator.call("ada", "/v1/control/start-run", message.SerializeToString()) == 200
    passed = control_pb2.StartRunRequest.FromString(coordinator.received[0][1])
    assert (passed.app_spec, passed.federation, passed.user_prompt) == ("", "", "")


@pytest.mark.parametrize("body", [b"\xff\xff", b"", b"\x0a\x03abc"])
def test_a_start_that_cannot_be_read_is_refused(coordinator, body):
    assert coordinator.call("ada", "/v1/control/start-run", body) == 400
    assert coordinator.received == []


@pytest.mark.parametrize("request_text", ["", "[]", "{", '{"do": null}', "3", '{"settings": {}}'])
def test_a_request_without_a_task_is_refused(coordinator, request_text):
    body = write_start_run(build_app_bundle(), {"request": request_text})
    assert coordinator.call("ada", "/v1/control/start-run", body) == 400
    assert coordinator.received == []


FORGED = {  # changes of a request, by which a submitter would disturb other persons and the recovery
    "in place of the successor of another run": {"continues": 77},
    "attempts that are no number": {"attempts": "many"},
    "a number of rounds": {"num_rounds": 3},
    "no folder": {"folder": ""},
    "a folder that is a list": {"folder": ["heart"]},
    "a folder with a null byte, which stops the recovery": {"folder": "heart/\0"},
    "a folder that no file system can encode": {"folder": "heart/\ud800"},
    "settings that are a text": {"settings": "heart"},
    "overrides that are mappings": {"do": "resume", "overrides": [{}]},
    "a command that is a mapping": {"rerun_command": {}},
    "an unknown field": {"person": "ada"},
    "a text as width": {"width": "80"},
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("caller", ["sam", "ada"])
def test_a_person_cannot_forge_a_field_of_the_recovery_or_send_another_type(coordinator, name, caller):
    assert coordinator.start(caller, {**RUN, **FORGED[name]}) == 400
    assert coordinator.received == []
    assert [line["event"] for line in coordinator.events] == ["request.refused"]


def test_a_deeply_nested_request_is_refused(coordinator):
    text = json.dumps(RUN)[:-1] + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}"
    body = write_start_run(build_app_bundle(), {"request": text})
    assert coordinator.call("sam", "/v1/control/start-run", body) == 400


@pytest.mark.parametrize("text", ["", "[]", "[" * 10**5, '{"settings": "heart"}', '{"settings": {"scenario": [1]}}'])
def test_a_stored_request_of_any_form_hides_no_other_run(text):
    status = SimpleNamespace(status="finished", sub_status="failed", details="fedlearn exit 3")
    run = SimpleNamespace(status=status, running_at="", pending_at="", finished_at="")
    configs = {1: {"request": text}, 2: {"request": json.dumps({**RUN, "continues": 9})}}
    client = object.__new__(CoordinatorClient)
    client.address = "localhost:8000"
    runs = SimpleNamespace(runs=lambda: dict.fromkeys(configs, run), config_of=lambda run: next(texts))
    texts = iter(configs.values())
    client._client = runs
    assert {state.id: state.experiment for state in client.run_states()} == {1: "", 2: "heart"}
    texts = iter(configs.values())
    assert client.successor(9) == 2


def test_the_coordinator_continues_a_run_with_the_fields_of_the_recovery(coordinator):
    request = {**RUN, "continues": 76, "attempts": 1, "num_rounds": 0}
    assert coordinator.start("coordinator", request, person="sam", name="r1") == 200


@pytest.mark.parametrize("how", ["now", "after the round"])
def test_a_person_stops_only_the_runs_of_this_person_and_an_admin_all(coordinator, how):
    def stop(name):
        if how == "now":
            return coordinator.stop(name, 77)
        return coordinator.start(name, {"do": "stop", "run": 77})

    unknown = 200 if how == "now" else 404
    assert [stop(name) for name in ("sam", "sue", "vic", "ada")] == [403, 403, 403, unknown]
    assert coordinator.start("sam") == 200
    assert [stop(name) for name in ("sam", "sue", "vic", "ada")] == [200, 403, 403, 200]
    refused = [line for line in coordinator.events if line["event"] == "request.refused"]
    first = ["sam", "sue", "vic"] if how == "now" else ["sam", "sue", "vic", "ada"]
    assert [line["person"] for line in refused] == [*first, "sue", "vic"]


@pytest.fixture
def default_interrupt():
    """Raise KeyboardInterrupt at SIGINT. An earlier test may have left another handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_a_stop_after_the_round_starts_no_process_and_reaches_the_run(coordinator):
    assert coordinator.start("sam") == 200
    submissions, begun = Submissions(coordinator.folder), len(coordinator.received)

    def run_until_stopped():
        with stoppable(submissions, 77, interval_s=0.5):  # the signal comes after the request, which runs an event loop
            assert coordinator.start("sam", {"do": "stop", "run": 77}) == 200
            threading.Event().wait(60)

    with pytest.raises(KeyboardInterrupt):
        run_until_stopped()
    assert len(coordinator.received) == begun
    with stoppable(submissions, 78, interval_s=0.01):  # another run continues
        threading.Event().wait(0.1)


@pytest.mark.parametrize("number", [None, "77", 7.7, True, -1, 2**70, "../77"])
def test_a_stop_of_no_run_writes_nothing(coordinator, number):
    coordinator.start("ada")
    before = sorted(coordinator.folder.rglob("*.stop"))
    assert coordinator.start("ada", {"do": "stop", "run": number}) == 404
    assert sorted(coordinator.folder.rglob("*.stop")) == before == []


def test_equal_stops_of_a_run_are_one_line(coordinator):
    for number in (77, 78):
        Submissions(coordinator.folder).add(Submission(number=number, name="r", person="sam", do="run", folder="f"))
    for _ in range(5):
        for number in (77, 78):
            assert coordinator.stop("sam", number) == 200
            assert coordinator.start("sam", {"do": "stop", "run": number}) == 200
    lines = [(line["request"], line["number"]) for line in coordinator.events]
    assert lines == [(name, number) for number in ("77", "78") for name in ("stop-run", "start-run")]


def test_equal_reads_are_one_line_and_other_requests_are_one_line_each(coordinator):
    for _ in range(5):
        assert coordinator.call("vic", "/v1/control/list-runs") == 200
        assert coordinator.start("sam") == 200
    assert [line["request"] for line in coordinator.events].count("list-runs") == 1
    assert [line["request"] for line in coordinator.events].count("start-run") == 5


def test_refused_requests_of_a_person_do_not_fill_the_disk(coordinator):
    coordinator.access._limit = RefusalLimit(max_lines=5)
    for number in range(9):
        assert coordinator.stop("vic", number) == 403
    assert coordinator.stop("sue", 1) == 403
    refused = [line["person"] for line in coordinator.events]
    assert (refused.count("vic"), refused.count("sue")) == (5, 1)


def test_a_run_that_flower_did_not_start_is_logged_as_such(coordinator):
    coordinator.status = 500
    assert coordinator.start("sam") == 500
    assert coordinator.events[0]["accepted"] is False
    assert Submissions(coordinator.folder).find(77) is None


def test_no_value_of_a_request_reaches_the_log_unchecked(coordinator):
    request = {**RUN, "folder": "a\x1b[2J\n" + "x" * 10**5, "do": "run\x07" * 1000}
    assert coordinator.start("sam", request) == 400
    text = (coordinator.folder / "audit.jsonl").read_text()
    assert len(text) < 4000
    assert text.count("\n") == 1
    assert "\\u001b" not in text
