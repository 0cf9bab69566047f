"""The coordinator resumes a run whose process has died, once, and never a run that a person has stopped."""

import json
import os
import time
from functools import partial

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.deploy.audit_log import read_events
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.coordinator_side import run_process, run_recovery
from fedlearn.deploy.coordinator_side.app_bundle import NAME_KEY, PERSON_KEY, REQUEST_KEY
from fedlearn.deploy.coordinator_side.control_api import RunStatus
from fedlearn.deploy.coordinator_side.ownership import DEPLOYMENT_FILE
from fedlearn.deploy.coordinator_side.run_recovery import MAX_AGE_S, MAX_ATTEMPTS, RunRecovery
from fedlearn.deploy.coordinator_side.submissions import Submission, Submissions
from fedlearn.deploy.persons import add_person, may_submit, revoke_person

DEAD = 2**22 + 1  # above the largest process id
RUN = {"do": "run", "folder": "heart/run", "settings": {"rounds": 5}, "chosen": True, "width": 80}
INTERRUPTED = RunStatus("finished", "failed", "No heartbeat received from the task", 0.0)


class Control:
    """A coordinator with runs: id -> (status, configuration)."""

    def __init__(self, state):
        self.runs, self.stopped, self.submissions = {}, [], Submissions(state)

    def add(self, request, status, person="alice"):
        number = 100 + len(self.runs)
        config = {REQUEST_KEY: json.dumps(request), PERSON_KEY: person, NAME_KEY: "name"}
        self.runs[number] = (status, config)
        fields = {"name": "name", "person": person, "do": request["do"], "folder": request["folder"]}
        self.submissions.add(Submission(number=number, **fields))
        return number

    def status(self, run_id):
        return self.runs[run_id][0]

    def configs(self):
        return dict(self.runs)

    def start(self, fab, config):
        return self.add(json.loads(config[REQUEST_KEY]), RunStatus("pending"), config[PERSON_KEY])

    def stop(self, run_id):
        self.stopped.append(run_id)
        self.runs[run_id] = (RunStatus("finished", "stopped"), self.runs[run_id][1])

    def request(self, run_id):
        return json.loads(self.runs[run_id][1][REQUEST_KEY])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(run_recovery, "STATUS_INTERVAL_S", 0.0)
    folder = tmp_path / "runs/heart/run"
    folder.mkdir(parents=True)
    (folder / DEPLOYMENT_FILE).write_text("{}")
    control, lines = Control(tmp_path), []
    return control, RunRecovery(control, tmp_path, tmp_path / "runs", report=lines.append), tmp_path, lines


def write_process(state, run_id, process):
    (state / run_process.RUNNING_FOLDER).mkdir(exist_ok=True)
    (state / run_process.RUNNING_FOLDER / str(run_id)).write_text(str(process))


def test_a_run_whose_process_is_dead_resumes_for_its_person_and_is_stopped_afterwards(place):
    control, recovery, state, lines = place
    run = control.add(RUN, RunStatus("running"))
    write_process(state, run, os.getpid())
    recovery.check()
    assert len(control.runs) == 1  # it lives
    write_process(state, run, DEAD)
    recovery.check()
    (new,) = control.runs.keys() - {run}
    request = control.request(new)
    assert (request["do"], request["folder"], request["continues"]) == ("resume", "heart/run", run)
    assert control.runs[new][1][PERSON_KEY] == "alice"
    assert control.stopped == [run]
    assert lines == ["run heart/run was interrupted after 0 rounds; it resumes"]
    recovery.check()
    assert len(control.runs) == 2


def test_a_run_that_died_before_it_had_a_folder_starts_again(place):
    control, recovery, _state, _ = place
    run = control.add({**RUN, "folder": "new"}, INTERRUPTED)
    recovery.check()
    (new,) = control.runs.keys() - {run}
    assert {**control.request(new)} == {
        **RUN,
        "folder": "new",
        "continues": run,
        "attempts": 1,
        "num_rounds": 0,
    }


@pytest.mark.parametrize(
    "status",
    [
        RunStatus("finished", "completed"),
        RunStatus("finished", "failed", "ServerApp failed with exception: fedlearn exit 3"),
        RunStatus("finished", "failed", "ServerApp failed with exception: fedlearn exit 130"),
        RunStatus("finished", "stopped"),
        RunStatus("pending"),
    ],
    ids=["completed", "failed", "stopped after its round", "stopped at once", "pending"],
)
def test_a_run_that_was_not_interrupted_is_left_alone(place, status):
    control, recovery, _, _ = place
    control.add(RUN, status)
    recovery.recover_all()
    recovery.check()
    assert len(control.runs) == 1
    assert control.stopped == []


def test_a_run_that_a_person_has_asked_to_stop_is_not_resumed(place):
    control, recovery, state, _ = place
    run = control.add(RUN, RunStatus("running"))
    control.submissions.request_stop(run)
    write_process(state, run, DEAD)
    recovery.check()
    assert len(control.runs) == 1
    assert control.stopped == [run]


def test_a_dry_run_is_not_resumed_because_it_would_train(place):
    control, recovery, state, _ = place
    run = control.add({**RUN, "settings": {"rounds": 5, "dry_run": True}}, RunStatus("running"))
    write_process(state, run, DEAD)
    recovery.check()
    assert (len(control.runs), control.stopped) == (1, [run])


@pytest.mark.parametrize("change", ["revoked", "viewer", "removed", "damaged"])
def test_a_run_of_a_person_who_may_start_no_runs_is_not_resumed(place, change):
    control, recovery, state, lines = place
    path = state / "persons.json"
    for name in ("alice", "bob"):
        add_person(path, name, "submitter")
    recovery.may_submit = partial(may_submit, path)
    runs = [control.add(RUN, RunStatus("running"), person) for person in ("alice", "bob")]
    for run in runs:
        write_process(state, run, DEAD)
    if change == "revoked":
        revoke_person(path, "alice")
    elif change == "damaged":
        path.write_text("{")
    else:
        listed = json.loads(path.read_text())["persons"]
        kept = {"viewer": [{**listed[0], "role": "viewer"}, listed[1]], "removed": listed[1:]}[change]
        path.write_text(json.dumps({"persons": kept}))
    recovery.check()
    assert control.stopped == runs
    resumed = {control.request(run).get("continues") for run in control.runs} - {None}
    assert resumed == (set() if change == "damaged" else {runs[1]})
    assert "alice may not start runs any more" in lines[0]
    assert [line["person"] for line in read_events(state)][:1] == ["alice"]
    recovery.check()
    recovery.recover_all()
    assert runs[0] not in {control.request(run).get("continues") for run in control.runs}


def test_after_a_restart_of_the_machine_each_run_has_one_successor(place):
    control, recovery, _state, _ = place
    first = control.add(RUN, RunStatus("running"))
    second = control.add({**RUN, "do": "resume", "overrides": ["rounds=9"], "continues": first}, RunStatus("running"))
    recovery.recover_all()  # the coordinator died after it had started the second run
    (third,) = control.runs.keys() - {first, second}
    assert control.request(third)["continues"] == second
    assert control.request(third)["overrides"] == ["rounds=9"]
    assert sorted(control.stopped) == [first, second]


def test_a_successor_that_the_superlink_had_no_time_to_record_is_watched_too(place, monkeypatch):
    control, recovery, state, _ = place
    run = control.add(RUN, RunStatus("running"))
    write_process(state, run, DEAD)
    start = control.start

    def start_and_die(fab, config):
        monkeypatch.setattr(control, "start", start)
        with monkeypatch.context() as patch:
            patch.setattr(control.submissions, "add", lambda submission: None)
            start(fab, config)
        raise ConnectionProblem("the SuperLink was killed")

    monkeypatch.setattr(control, "start", start_and_die)
    recovery.check()
    (second,) = control.runs.keys() - {run}
    assert control.submissions.find(second) is None
    recovery.check()
    assert control.stopped == [run]
    assert len(control.runs) == 2
    control.runs[second] = (INTERRUPTED, control.runs[second][1])
    recovery.check()
    (third,) = control.runs.keys() - {run, second}
    assert control.request(third)["continues"] == second


def test_an_old_interruption_is_not_resumed_by_a_new_coordinator(place):
    control, recovery, _, _ = place
    ends = time.time()
    control.add(RUN, RunStatus("finished", "failed", "", ends - MAX_AGE_S - 1))
    recovery.recover_all()
    assert len(control.runs) == 1
    control.add(RUN, RunStatus("finished", "failed", "", ends))
    recovery.recover_all()
    assert len(control.runs) == 3


def test_a_run_that_dies_again_and_again_without_a_round_is_given_up_by_name(place):
    control, recovery, _state, lines = place
    control.add(RUN, INTERRUPTED)
    for _ in range(3 * MAX_ATTEMPTS):
        recovery.check()
        control.runs = {run: (INTERRUPTED, config) for run, (_, config) in control.runs.items()}
    assert len(control.runs) == 1 + MAX_ATTEMPTS
    assert "heart/run was interrupted 11 times without a new round; it does not resume" in lines[-1]


def test_each_new_round_allows_new_attempts(place):
    control, recovery, state, _ = place
    control.add(RUN, INTERRUPTED)
    for _ in range(2 * MAX_ATTEMPTS):
        with (state / "runs/heart/run/metrics.jsonl").open("a") as file:
            file.write("{}\n")
        recovery.check()
        control.runs = {run: (INTERRUPTED, config) for run, (_, config) in control.runs.items()}
    assert len(control.runs) == 1 + 2 * MAX_ATTEMPTS


def test_a_process_that_dies_before_it_writes_its_id_is_noticed(place, monkeypatch):
    control, recovery, state, _ = place
    control.add(RUN, RunStatus("starting"))
    (state / run_recovery.PROCESSES_FILE).write_text(json.dumps([os.getpid()]))
    monkeypatch.setattr(run_recovery, "START_GRACE_S", 0.0)
    recovery.check()
    assert len(control.runs) == 1  # the living process may be its process
    (state / run_recovery.PROCESSES_FILE).write_text(json.dumps([DEAD]))
    recovery.check()
    assert len(control.runs) == 2


def test_the_file_of_a_process_exists_during_its_run_only(tmp_path):
    with run_process.process_file(tmp_path, 7):
        assert run_process.read_process(tmp_path, 7) == os.getpid()
        assert run_process.known_processes(tmp_path) == {os.getpid()}
    assert run_process.read_process(tmp_path, 7) is None
    assert not run_process.is_alive(DEAD)
