"""`status` and `cancel` show and stop the runs of a federation from any terminal."""

import json
import re

import pytest

from fedlearn.deploy.cancel import main as cancel
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.fetch import main as fetch
from fedlearn.deploy.history import main as history
from fedlearn.deploy.logs import main as logs
from fedlearn.deploy.person_keys import add_person_to
from fedlearn.deploy.persons import revoke_person
from fedlearn.deploy.remote_runs import list_runs
from fedlearn.deploy.run_log import Follower
from fedlearn.deploy.runs import main as runs
from fedlearn.deploy.status import main as status
from fedlearn.deploy.status import read_status

pytestmark = pytest.mark.process


@pytest.fixture
def options(federation):
    return ["--coordinator", federation.address, "--keys", str(federation.keys / "operator")]


@pytest.fixture
def finished(federation, options):
    """Return the number of a completed run of the federation."""
    for _ in range(2):
        states = [state for state in list_runs(federation.address, federation.keys / "operator") if state.name]
        completed = [state.id for state in states if state.outcome == "completed"]
        if completed:
            return completed[0]
        assert federation.run("rounds=1", name="shown").code == 0
    raise AssertionError("no run is completed")


def read(capsys, *arguments):
    capsys.readouterr()
    code = status([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_status_names_the_nodes_and_a_finished_run(federation, options, capsys):
    assert federation.run("rounds=1", name="shown").code == 0
    code, shown = read(capsys, *options, "--check")
    assert code == 0
    assert [node["state"] for node in shown["nodes"]] == ["online", "online"]
    assert all(node["name"] and node["since"] for node in shown["nodes"])
    assert all(node["since"][:19] <= node["last_heartbeat"][:19] <= shown["time"] for node in shown["nodes"])
    (run,) = [run for run in shown["runs"] if run["folder"] == "shown"]
    assert (run["status"], run["outcome"], run["exit_code"]) == ("finished", "completed", 0)
    assert run["experiment"] == "diabetes · fedavg"
    assert status(options) == 0
    table = capsys.readouterr().out
    assert "shown" in table
    assert "online" in table


@pytest.mark.slow
def test_cancel_stops_a_run_after_its_round(federation, options):
    def stop():
        runs = read_status(federation.address, federation.keys / "operator")["runs"]
        (run,) = [run for run in runs if run["status"] == "running"]
        assert run["last_line"].startswith("round ")
        assert cancel([str(run["id"]), *options]) == 0

    run = federation.run("rounds=1000", name="cancelled", events=[(lambda run: len(run.lines) >= 2, stop)])
    assert run.code == 130
    assert run.summary["status"] == "stopped"


def test_a_run_that_has_ended_or_does_not_exist_is_refused(finished, options, capsys):
    ended = finished
    assert cancel([str(ended), *options]) == 2
    assert "has ended" in capsys.readouterr().err
    assert cancel(["12345", *options]) == 2
    assert "no run is 12345" in capsys.readouterr().err


def test_a_wrong_token_shows_nothing(federation, options, tmp_path, capsys):
    for name in ("ca.crt", "token"):
        source = federation.keys / "operator" / name
        (tmp_path / name).write_text("wrong" if name == "token" else source.read_text())
    assert status([*options[:2], "--keys", str(tmp_path)]) == 2
    assert "token" in capsys.readouterr().err


def printed(capsys, command, *arguments, code=0):
    capsys.readouterr()
    assert command([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_run_has_one_name_in_all_commands_and_logs(federation, options, finished, tmp_path, capsys):
    (run,) = [run for run in printed(capsys, runs, *options) if run["id"] == finished]
    assert run["person"] == "operator"
    assert run["round"] == run["rounds"]
    assert logs([run["name"], *options]) == 0
    assert f"round {run['rounds']}/{run['rounds']}" in capsys.readouterr().out
    fetched = printed(capsys, fetch, run["name"], *options, "--to", str(tmp_path / "got"))
    assert {"summary.json", "metrics.jsonl", "model/parameters.safetensors"} <= {f["path"] for f in fetched["files"]}
    places = [federation.folder / name for name in ("coordinator", "node0", "node1")]
    for place in places:
        assert printed(capsys, history, str(place), "--verify")["problems"] == []
        (row,) = printed(capsys, history, str(place), "--run", run["name"])
        assert (row["run"], row["person"], row["folder"]) == (run["name"], "operator", run["folder"])
        assert row["bytes_sent"] > 0
    assert run["name"] in [row["run"] for row in printed(capsys, history, *options)]


def test_a_viewer_sees_runs_and_changes_nothing(federation, options, finished, capsys):
    if not (federation.keys / "persons/vic").exists():
        add_person_to(federation.keys, "vic", "viewer")
    viewer = [*options[:2], "--keys", str(federation.keys / "persons/vic")]
    (run, *_) = printed(capsys, runs, *viewer)
    with pytest.raises(ConnectionProblem, match="vic has the role viewer, expected submitter"):
        Follower(federation.address, federation.keys / "persons/vic", 1.0).submit({"do": "run", "folder": "x"})
    assert fetch([run["name"], *viewer]) == 2
    assert "expected submitter" in capsys.readouterr().err
    revoke_person(federation.keys / "coordinator/persons.json", "vic")
    assert runs(viewer) == 2


def test_log_files_have_utc_times_and_no_colours(federation):
    for name in ("coordinator/superlink.log", "coordinator/superexec.log", "node0/messenger.log", "node0/trainer.log"):
        lines = (federation.folder / name).read_text().splitlines()
        assert lines
        assert not [line for line in lines if "\x1b" in line], name
        stamped = [line for line in lines if re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z ", line) or line.startswith("  ")]
        assert stamped == [line for line in lines if line != "stopped"], name
