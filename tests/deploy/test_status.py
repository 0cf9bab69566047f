"""`status` and `cancel` show and stop the runs of a federation from any terminal."""

import json

import pytest

from fedlearn.deploy.cancel import main as cancel
from fedlearn.deploy.status import main as status
from fedlearn.deploy.status import read_status

pytestmark = pytest.mark.process


@pytest.fixture
def options(federation):
    return ["--coordinator", federation.address, "--keys", str(federation.keys / "operator")]


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


def test_a_run_that_has_ended_or_does_not_exist_is_refused(federation, options, capsys):
    ended = read(capsys, *options)[1]["runs"][0]["id"]
    assert cancel([str(ended), *options]) == 2
    assert "has ended" in capsys.readouterr().err
    assert cancel(["12345", *options]) == 2
    assert "does not know run 12345" in capsys.readouterr().err


def test_a_wrong_token_shows_nothing(federation, options, tmp_path, capsys):
    for name in ("ca.crt", "token"):
        source = federation.keys / "operator" / name
        (tmp_path / name).write_text("wrong" if name == "token" else source.read_text())
    assert status([*options[:2], "--keys", str(tmp_path)]) == 2
    assert "token" in capsys.readouterr().err
