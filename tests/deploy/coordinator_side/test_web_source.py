"""The page and the metrics of a coordinator show nodes and runs, and accept its persons."""

import json

import pytest
from filelock import FileLock
from run_folders import HOSTILE, RunFolder, line

from fedlearn.deploy.audit_log import AuditLog
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.coordinator_side.control_api import NodeState, RunState
from fedlearn.deploy.coordinator_side.metrics import coordinator_samples
from fedlearn.deploy.coordinator_side.web_source import CoordinatorSource, PersonAccounts
from fedlearn.deploy.metrics import format_metrics
from fedlearn.deploy.node_side.metrics import AuditCounts, node_samples
from fedlearn.deploy.persons import add_person, revoke_person

SECONDS = "2026-01-01T00:00:00+00:00"


class Control:
    """A coordinator with two nodes, and one run that waits."""

    problem = ""

    def node_states(self):
        if self.problem:
            raise ConnectionProblem(self.problem)
        names = {"north": ("online", SECONDS), HOSTILE: ("registered", "")}
        return [
            NodeState(name=name, id=number, state=state, since=since)
            for number, (name, (state, since)) in enumerate(names.items())
        ]

    def run_states(self):
        fields = {"outcome": "", "exit_code": None, "started": SECONDS, "finished": "", "person": "ana"}
        shown = {"folder": HOSTILE, "experiment": f"{HOSTILE} · fedavg"}
        return [
            RunState(id=number, status=status, **fields, **shown, name="20260301-2")
            for number, status in ((7, "pending"), (8, "running"))
        ]


@pytest.fixture
def source(tmp_path):
    folder = RunFolder(tmp_path / "runs/digits/first").add(line(1), line(2, epsilon=1.5, reason="gone"))
    (folder.path / "deployment.json").write_text(json.dumps({"id": "x", "person": "ben"}))
    members = {"north": {"version": "0.2.0", "framework": "torch"}, HOSTILE: HOSTILE}
    (tmp_path / "members.json").write_text(json.dumps(members))
    return CoordinatorSource(Control(), tmp_path / "runs", "coordinator:8000", tmp_path)


def test_nodes_runs_and_submitters_are_shown(source):
    snapshot = source.snapshot()
    assert [(node.name, node.state) for node in snapshot.nodes] == [("north", "online"), (HOSTILE, "registered")]
    assert [(run.state, run.submitter) for run in snapshot.runs] == [("queued", "ana"), ("interrupted", "ben")]
    assert [run.name for run in snapshot.runs] == ["20260301-2", "x"]
    assert [(node.version, node.framework) for node in snapshot.nodes] == [("0.2.0", "torch"), ("", "")]
    assert snapshot.num_runs == 2
    assert source.detail("digits/first").run.submitter == "ben"
    assert source.detail("digits/second") is None


def test_runs_are_shown_while_the_coordinator_gives_no_answer(source, monkeypatch):
    monkeypatch.setattr(Control, "problem", "no connection\n  advice  none")
    snapshot = source.snapshot()
    assert [run.key for run in snapshot.runs] == ["digits/first"]
    assert snapshot.problem == "The coordinator gives no answer: no connection"


def test_persons_sign_in_by_token_until_it_is_revoked(tmp_path):
    path = tmp_path / "persons.json"
    token = add_person(path, "ana", "viewer")
    audit = AuditLog(tmp_path)
    accounts = PersonAccounts(path, audit, tmp_path / "runs")
    assert accounts.check(token) == "ana"
    assert accounts.is_active("ana")
    for wrong in ("", token[:-1], token + "x", "\udcff", HOSTILE):
        assert accounts.check(wrong) is None
    accounts.record("ana", "10.0.0.1")
    accounts.record(None, HOSTILE)
    lines = [json.loads(text) for text in audit.path.read_text().splitlines()]
    assert [(each["event"], each.get("person")) for each in lines] == [("web.signed_in", "ana"), ("web.refused", None)]
    assert token not in audit.path.read_text()
    for _ in range(300):  # neither strangers nor persons fill the disk
        accounts.record(None, "10.0.0.2")
        accounts.record("ana", "10.0.0.1")
    assert len(audit.path.read_text().splitlines()) == 200
    revoke_person(path, "ana")
    assert accounts.check(token) is None
    assert not accounts.is_active("ana")
    path.write_text("damaged")
    assert not accounts.is_active("ana")


def test_a_report_is_for_the_submitter_of_the_run_and_for_admins(source, tmp_path):
    path = tmp_path / "persons.json"
    for name, role in {"ada": "admin", "ben": "submitter", "sue": "submitter", "vic": "viewer"}.items():
        add_person(path, name, role)
    accounts = PersonAccounts(path, AuditLog(tmp_path), tmp_path / "runs")
    keys = ("digits/first", "none", "", "..", "../runs/digits/first", HOSTILE)
    opened = {name: [accounts.may_open_report(name, key) for key in keys] for name in ("ben", "sue", "vic", "", "eve")}
    assert opened.pop("ben")[:2] == [True, False]
    assert not any(any(each) for each in opened.values())
    assert accounts.may_open_report("ada", "digits/first")
    revoke_person(path, "ben")
    assert not accounts.may_open_report("ben", "digits/first")


def read(metrics):
    """Return name with labels -> value of a text in the format of Prometheus."""
    lines = [text for text in metrics().decode().splitlines() if text.startswith("fedlearn_")]
    return {name: float(value) for name, _, value in (text.rpartition(" ") for text in lines)}


def coordinator_metrics(source, tmp_path):
    places = {"keys": tmp_path / "keys", "state": tmp_path, "runs": tmp_path / "runs"}
    return format_metrics(lambda: coordinator_samples(source.snapshot, **places))


def test_a_coordinator_measures_nodes_runs_and_its_disk(source, tmp_path):
    with FileLock(tmp_path / "runs/digits/first/.lock"):
        numbers = read(coordinator_metrics(source, tmp_path))
    run = 'run="digits/first"'
    assert numbers['fedlearn_nodes{state="online"}'] == 1
    assert numbers['fedlearn_node_online{node="north"}'] == 1
    assert numbers['fedlearn_runs{state="running"}'] == numbers['fedlearn_runs{state="queued"}'] == 1
    assert numbers[f"fedlearn_run_rounds_total{{{run}}}"] == 2
    assert numbers[f"fedlearn_run_planned_rounds{{{run}}}"] == 10
    assert numbers[f"fedlearn_run_round_seconds{{{run}}}"] == 0.5
    assert numbers[f"fedlearn_run_epsilon{{{run}}}"] == 1.5
    assert numbers[f"fedlearn_run_client_failures_total{{{run}}}"] == 1
    assert numbers[f'fedlearn_run_bytes_total{{direction="from_clients",{run}}}'] == 200
    assert numbers['fedlearn_disk_free_bytes{folder="runs"}'] > 0
    assert numbers["fedlearn_up"] == 1


def test_metrics_show_a_coordinator_that_gives_no_answer(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Control, "problem", "no connection")
    assert read(coordinator_metrics(source, tmp_path))["fedlearn_up"] == 0


def test_a_hostile_name_does_not_change_the_format(source, tmp_path, monkeypatch):
    name = 'x"} 1\nfedlearn_up 7\n\\'
    monkeypatch.setattr(Control, "node_states", lambda self: [NodeState(name=name, id=1, state="online", since=name)])
    numbers = read(coordinator_metrics(source, tmp_path))
    assert numbers["fedlearn_up"] == 1
    assert sum(key.startswith("fedlearn_node_online") for key in numbers) == 1


def test_a_node_measures_its_parts_and_requests_without_any_text_of_others(tmp_path):
    events = [
        {"event": "node.started"},
        {"event": "request", "kind": "fit", "run": HOSTILE, "epsilon": 0.5, "time": SECONDS},
        {"event": "request", "kind": HOSTILE, "epsilon": 1.5, "time": SECONDS},
        {"event": "request.refused", "code": "policy", "epsilon": None, "time": SECONDS},
        {"event": "request.refused", "code": HOSTILE, "time": HOSTILE},
    ]
    log = tmp_path / "audit.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events) + "[]\n{\n\xff\n")
    counts = AuditCounts(tmp_path)
    metrics = format_metrics(lambda: node_samples(tmp_path, [], counts))
    numbers = read(metrics)
    assert numbers['fedlearn_requests_total{kind="fit"}'] == 1
    assert numbers['fedlearn_requests_total{kind="other"}'] == 1
    assert numbers['fedlearn_refusals_total{code="policy"}'] == numbers['fedlearn_refusals_total{code="other"}'] == 1
    assert numbers["fedlearn_epsilon"] == 1.5
    assert numbers['fedlearn_part_works{part="messenger"}'] == 0
    assert HOSTILE[:8] not in metrics().decode()
    with log.open("a") as file:
        file.write(json.dumps(events[1]) + "\n")
    assert read(metrics)['fedlearn_requests_total{kind="fit"}'] == 2
