"""Errors before a request is sent, and errors of a coordinator that does not answer."""

from __future__ import annotations

import pytest

from fedlearn.deploy import keys
from fedlearn.deploy.coordinator_side.app_bundle import build_app_bundle
from fedlearn.deploy.rehearse import main as rehearse
from fedlearn.deploy.submit import compose_request, main


@pytest.fixture
def submit(tmp_path, capsys):
    keys.create(tmp_path / "keys", ["localhost"], [])

    def shown(*words):
        code = main(["--keys", str(tmp_path / "keys/operator"), "--coordinator", "localhost:1", *words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return shown


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["strategy=fedprx"], "did you mean strategy=fedprox?"),
        (["rounds=0"], "rounds is 0"),
        (["local.learning_rat=1"], "local.learning_rat=1 is not a setting"),
        (["engine=vector"], "engine=vector is for simulations"),
        (["-m", "seed=1,2"], "one run at a time"),
        (["engine.deadlin=3"], "engine.deadlin=3 is not a setting"),
    ],
)
def test_words_are_refused_as_in_a_simulation(submit, words, reason):
    code, shown = submit(*words)
    assert code == 2
    assert reason in shown


def test_a_coordinator_that_is_not_there_is_named(submit):
    code, shown = submit("scenario=diabetes")
    assert code == 2
    assert "no connection to localhost:1: no program listens there" in shown


def test_missing_keys_are_named(tmp_path, capsys):
    assert main(["--keys", str(tmp_path), "scenario=diabetes"]) == 2
    assert "token cannot be read" in capsys.readouterr().err


def test_help_has_our_options_and_the_simulators_words(submit):
    code, shown = submit("--help")
    assert code == 0
    assert "--resume FOLDER" in shown
    assert "strategy: " in shown


def test_the_folder_is_the_coordinators_unless_it_was_named():
    assert compose_request(["scenario=diabetes"])["folder"].startswith("diabetes/fedavg/")
    named = compose_request(["scenario=diabetes", "hydra.run.dir=mine"])
    assert (named["folder"], named["chosen"]) == ("mine", True)


def test_the_bundle_is_small_and_the_same_each_time():
    assert build_app_bundle().content == build_app_bundle().content
    assert len(build_app_bundle().content) < 5000


def test_a_rehearsal_refuses_more_nodes_than_clients(capsys):
    assert rehearse(["num_nodes=20", "scenario=diabetes"]) == 2
    assert "num_nodes is 20\n  expected  at most 10" in capsys.readouterr().err


@pytest.mark.parametrize("init", ["../secret.safetensors", "/etc/hostname", "link.safetensors"])
def test_a_submitter_cannot_start_a_run_from_a_file_outside_the_coordinator_s_runs(tmp_path, init):
    pytest.importorskip("flwr", reason="Flower is not installed")
    from fedlearn.deploy.coordinator_side.server_app import execute
    from fedlearn.runner.run_folder import RunFolderError

    runs = tmp_path / "runs"
    runs.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"not for submitters")
    (runs / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    request = compose_request(["scenario=diabetes"])
    request["settings"]["init"] = init
    with pytest.raises(RunFolderError, match="outside the coordinator's runs"):
        execute({**request, "do": "run"}, None, 1, runs)
    assert not (runs / request["folder"]).exists()
