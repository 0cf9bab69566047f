"""The files and the output of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs

from fedlearn.runner.compat import Composer
from fedlearn.runner.start import main

needs("torch")

IN_TURN = ("scenario=diabetes", "rounds=1", "report=false", "num_jobs=1")  # jobs in this process


def test_a_run_leaves_its_files_and_says_where(run, summary, capsys):
    code, folder = run()
    assert code == 0
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "clients.csv", "summary.json", "checkpoints"} <= names
    assert {"partition.json", "run.log"} <= names
    assert summary(folder)["status"] == "done"
    assert len(summary(folder)["parameters_sha256"]) == 64
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    shown = capsys.readouterr()
    assert "saved     run" in shown.out
    assert shown.err == ""


def test_config_yaml_of_a_run_repeats_it_from_anywhere(run, summary, here, monkeypatch, tmp_path, capsys):
    _, folder = run("strategy=fedavgm", "strategy.momentum=0.5", "seed=7")
    monkeypatch.chdir(tmp_path)
    assert main(["--config-path", "work/run", "--config-name", "config", "hydra.run.dir=again"]) == 0
    assert summary(tmp_path / "again")["parameters_sha256"] == summary(folder)["parameters_sha256"]
    assert (tmp_path / "again/config.yaml").read_text().partition("\n")[2] == (
        (folder / "config.yaml").read_text().partition("\n")[2]
    )


def test_without_a_folder_of_its_own_a_repeated_run_gets_one_like_any_other(run, here, capsys):
    _, folder = run("strategy=fedavgm")
    assert main(["--config-path", str(folder), "--config-name", "config"]) == 0
    (repeated,) = (here / "outputs/diabetes/fedavgm").iterdir()
    assert (repeated / "summary.json").exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run, capsys):
    _, folder = run()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _ = run("seed=2")
    assert code == 2
    shown = capsys.readouterr().err
    assert "already holds a run" in shown
    assert "simulations.resume run" in shown
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_two_runs_started_at_the_same_moment_never_share_a_folder(here):
    # the clock does not move, so both runs choose the same folder
    script = (
        "import sys, hydra.core.utils as u\n"
        "from datetime import datetime as d\n"
        "u.datetime = type('Still', (), {'now': staticmethod(lambda: d(2026, 1, 2))})\n"
        "from simulations.run import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = [sys.executable, "-c", script, "scenario=diabetes", "rounds=2", "report=false"]
    runs = [subprocess.Popen(argv, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        for process in runs:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in runs:
            process.kill()
            process.communicate()
    folders = list((here / "outputs/diabetes/fedavg").iterdir())
    assert len(folders) == 2
    assert all(len((folder / "metrics.jsonl").read_text().splitlines()) == 2 for folder in folders)


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(here, summary, capsys):
    assert main(["-m", *IN_TURN, "seed=1,2", "strategy=fedavg,fedprox"]) == 0
    (sweep,) = (here / "multirun").iterdir()
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == [
        "0_seed=1_strategy=fedavg", "1_seed=1_strategy=fedprox", "2_seed=2_strategy=fedavg", "3_seed=2_strategy=fedprox"
    ]  # fmt: skip
    assert "job 3: seed=2, strategy=fedprox" in capsys.readouterr().out
    summaries = [summary(folder) for folder in folders]
    assert {(item["seed"], item["strategy"]) for item in summaries} == {
        (1, "fedavg"), (1, "fedprox"), (2, "fedavg"), (2, "fedprox")
    }  # fmt: skip


def test_a_job_of_a_sweep_that_fails_does_not_stop_the_others(here, summary, capsys):
    words = ["-m", *IN_TURN, "strategy.clients_per_round=99,2"]
    assert main(words) == 2
    (sweep,) = (here / "multirun").iterdir()
    (folder,) = (path for path in sweep.iterdir() if path.is_dir())
    assert folder.name == "1_clients_per_round=2"
    assert summary(folder)["status"] == "done"
    assert "at most 10, the number of clients" in capsys.readouterr().err


def test_a_job_that_cannot_be_composed_does_not_stop_the_others(here, summary, capsys):
    assert main(["-m", *IN_TURN, "strategy=fedavg,fedprox", "hydra.sweep.subdir=mu_${strategy.mu}"]) == 2
    (sweep,) = (here / "multirun").iterdir()
    (folder,) = (path for path in sweep.iterdir() if path.is_dir())
    assert (folder.name, summary(folder)["strategy"]) == ("mu_0.1", "fedprox")
    assert "strategy.mu" in capsys.readouterr().err


def test_each_job_of_a_sweep_is_composed_once_after_the_check_of_each_value(here, monkeypatch):
    composed = []
    compose = Composer.compose
    monkeypatch.setattr(Composer, "compose", lambda self, *rest: composed.append(rest) or compose(self, *rest))
    assert main(["-m", *IN_TURN, "seed=1,2,3", "strategy=fedavg,fedprox"]) == 0
    checks = 1 + 2 + 1  # the first values, and each further value
    assert len(composed) == checks + 6


def test_the_last_value_of_a_setting_counts_in_a_sweep(here, summary):
    assert main(["-m", *IN_TURN, "seed=1,2", "seed=3"]) == 0
    assert [summary(path.parent)["seed"] for path in here.glob("multirun/*/*/summary.json")] == [3]


def test_early_stopping_ends_a_run_well_and_says_why(run, summary):
    code, folder = run("rounds=30", "early_stop.metric=rmse", "early_stop.patience=1", "early_stop.min_delta=0.05")
    assert code == 0
    assert summary(folder)["status"] == "early_stopped"
    assert "rmse has not improved" in summary(folder)["reason"]
    assert (folder / f"checkpoints/round_{summary(folder)['rounds']:06d}.safetensors").exists()


def test_checkpoint_every_saves_each_nth_round_and_the_last(run):
    _, folder = run("rounds=5", "checkpoint_every=2")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "round_000004.safetensors",
        "round_000005.safetensors",
    ]


def test_a_run_interrupted_between_checkpoints_saves_the_round_it_stops_at(run, summary, monkeypatch):
    from fedlearn.runner.interrupt import Interrupt

    count = iter(range(100))
    monkeypatch.setattr(
        Interrupt, "is_requested", property(lambda self: next(count) >= 3, lambda self, value: None), raising=False
    )
    code, folder = run("rounds=9", "checkpoint_every=5")
    assert code == 130
    assert summary(folder)["rounds"] == 3
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())  # the best rounds so far are saved, too
    assert saved == ["round_000002.safetensors", "round_000003.safetensors"]


def test_both_frameworks_and_both_engines_start_from_the_same_words(run, summary):
    pytest.importorskip("jax")
    for framework in ("torch", "jax"):
        for engine in ("serial", "vector"):
            _, folder = run(f"framework={framework}", f"engine={engine}", folder=f"{framework}_{engine}")
            assert summary(folder)["framework"] == framework
            assert summary(folder)["engine"] == engine


def test_piped_output_is_one_plain_line_a_round_and_a_reader_that_leaves_does_not_end_the_run(command, here, summary):
    argv = [sys.executable, "-m", "simulations.run", "scenario=diabetes", "rounds=30", "hydra.run.dir=run"]
    process = subprocess.Popen([*argv, "report=false"], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        first = process.stdout.readline()
        process.stdout.close()
        assert b"\x1b" not in first
        assert process.wait(timeout=120) == 0
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
    assert summary(here / "run")["rounds"] == 30


def test_help_names_the_groups_and_answers_without_a_framework(command):
    done = command("simulations.run", "--help")
    assert done.returncode == 0
    for group in ("scenario: ", "strategy: ", "engine: ", "experiment: ", "model: "):
        assert group in done.stdout
    loaded = command("simulations.run", "--help", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}).stderr
    for heavy in ("torch", "jax", "sklearn", "matplotlib", "flwr"):
        assert not any(line.split("|")[-1].strip() == heavy for line in loaded.splitlines()), heavy


@pytest.mark.parametrize("words", [["--cfg", "job"], ["--cfg", "job", "--resolve"], ["--info", "config"]])
def test_looking_at_the_configuration_writes_nothing(command, here, words):
    done = command("simulations.run", *words, "strategy.weighting=equal")
    assert done.returncode == 0
    assert "weighting: equal" in done.stdout
    assert not any(here.iterdir())


def test_log_lines_and_warnings_go_to_run_log_and_not_to_the_terminal(run, capfd):
    code, folder = run("scenario=digits", "partition=pathological", "partition.num_clients=2", "rounds=1")
    assert code == 0
    assert "leaves classes" in (folder / "run.log").read_text()
    shown = capfd.readouterr()
    assert "leaves classes" not in shown.out + shown.err


def test_the_environment_of_a_run_turns_telemetry_off_unless_the_user_turned_it_on(run, monkeypatch):
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    run(folder="a")
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    run(folder="b")
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"


def test_recorded_command_is_json(run):
    _, folder = run()
    assert "simulations.run" in json.loads((folder / "environment.json").read_text())["rerun_command"]
    assert Path(folder / "partition.json").exists()
