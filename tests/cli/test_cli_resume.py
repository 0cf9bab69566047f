"""A run that is stopped at any point resumes, and its result equals the result of an uninterrupted run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from fedlearn.callbacks.run_history import read_history
from fedlearn.core import checkpoint
from simulations.resume import main as resume

STRATEGIES = ("fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedavgm")
ROUNDS = 10
LONG = ["scenario=diabetes", f"rounds={ROUNDS}", "report=false", "hydra.run.dir=run"]


@pytest.fixture
def stop(monkeypatch):
    """Return ``stop(k)``, which interrupts the next run before or after it saves round k."""

    def at(round: int, *, after: bool = True) -> None:
        save = checkpoint.save

        def then_stop(folder, state, *args, **kwargs):
            if state.round < round or after:
                save(folder, state, *args, **kwargs)
            if state.round == round:
                monkeypatch.setattr(checkpoint, "save", save)
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "save", then_stop)

    return at


def without_times(history):
    """Return the lines of the rounds without times."""
    return [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in history]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_run_ends_where_an_uninterrupted_one_does_bit_for_bit(run, stop, summary, strategy, framework):
    pytest.importorskip(framework)
    words = [f"strategy={strategy}", "strategy.clients_per_round=4", f"framework={framework}", "rounds=5"]
    _, whole = run(*words, folder="whole")
    stop(2)
    code, folder = run(*words)
    assert code == 130
    assert resume([str(folder)]) == 0
    assert summary(folder)["parameters_sha256"] == summary(whole)["parameters_sha256"]
    assert without_times(read_history(folder)) == without_times(read_history(whole))
    assert (folder / "clients.csv").read_text() == (whole / "clients.csv").read_text()
    assert (folder / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


@pytest.mark.parametrize("strategy", ["fedavg", "fedasync", "fedbuff"])
def test_a_run_on_a_clock_goes_on_to_the_same_virtual_second(run, stop, summary, strategy):
    words = [f"strategy={strategy}", "system=lognormal", "system.dropout=0.1", "rounds=6", "max_failures=0.8"]
    _, whole = run(*words, folder="whole")
    stop(3)
    assert run(*words)[0] == 130
    assert resume(["run"]) == 0
    folder = whole.parent / "run"
    assert summary(folder)["parameters_sha256"] == summary(whole)["parameters_sha256"]
    assert without_times(read_history(folder)) == without_times(read_history(whole))
    clocks = [line["clock"] for line in read_history(folder)]
    assert clocks == sorted(clocks)
    assert summary(folder)["clock"] == clocks[-1] > 0


def test_a_round_that_was_measured_but_not_saved_is_measured_again_and_not_twice(run, stop, summary):
    pytest.importorskip("torch")
    _, whole = run(folder="whole")
    stop(2, after=False)
    _, folder = run()
    assert [line["round"] for line in read_history(folder)] == [1, 2]
    assert resume([str(folder)]) == 0
    assert without_times(read_history(folder)) == without_times(read_history(whole))


def test_a_run_stopped_before_its_first_checkpoint_starts_from_the_beginning(run, stop, summary, capsys):
    pytest.importorskip("torch")
    _, whole = run(folder="whole")
    stop(1, after=False)
    _, folder = run()
    assert resume([str(folder)]) == 0
    assert "the run starts from the first round" in capsys.readouterr().out
    assert summary(folder)["parameters_sha256"] == summary(whole)["parameters_sha256"]


def test_a_damaged_checkpoint_is_told_and_passed_over(run, stop, summary, capsys):
    pytest.importorskip("torch")
    _, whole = run("rounds=5", folder="whole")
    stop(3)
    _, folder = run("rounds=5")
    newest = folder / "checkpoints/round_000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    assert resume([str(folder)]) == 0
    assert "round_000003.safetensors" in capsys.readouterr().out
    assert summary(folder)["parameters_sha256"] == summary(whole)["parameters_sha256"]


def test_when_all_checkpoints_are_damaged_nothing_is_touched(run, stop, capsys):
    pytest.importorskip("torch")
    stop(2)
    _, folder = run()
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"")
    lines = (folder / "metrics.jsonl").read_bytes()
    assert resume([str(folder)]) == 2
    assert "no usable checkpoint" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == lines


def test_a_run_stopped_between_its_last_round_and_its_summary_gets_the_summary(run, stop, summary):
    pytest.importorskip("torch")
    stop(3)
    _, folder = run()
    assert not (folder / "summary.json").exists()
    assert resume([str(folder)]) == 0
    assert summary(folder)["status"] == "done"
    assert summary(folder)["parameters_sha256"]


def test_a_complete_run_says_so_and_more_rounds_go_on_from_its_end(run, summary, capsys):
    pytest.importorskip("torch")
    _, whole = run("rounds=5", folder="whole")
    _, folder = run()
    assert resume([str(folder)]) == 0
    assert "run is complete: all 3 rounds are done" in capsys.readouterr().out
    assert resume([str(folder), "rounds=5"]) == 0
    assert summary(folder)["parameters_sha256"] == summary(whole)["parameters_sha256"]
    assert "rounds: 5" in (folder / "config.yaml").read_text()


def test_a_run_that_stopped_early_stays_so_unless_it_is_told_otherwise(run, summary, capsys):
    pytest.importorskip("torch")
    _, folder = run("rounds=8", "early_stop.metric=rmse", "early_stop.patience=1", "early_stop.min_delta=0.05")
    assert summary(folder)["status"] == "early_stopped"
    assert resume([str(folder)]) == 0
    assert "is complete: rmse has not improved" in capsys.readouterr().out
    assert resume([str(folder), "early_stop.metric=null"]) == 0
    assert summary(folder)["status"] == "done"
    assert summary(folder)["rounds"] == 8


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("strategy.weighting=equal", "completed rounds had another value"),
        ("seed=2", "completed rounds had another value"),
        ("local.batch_size=1", "completed rounds had another value"),
        ("evaluate_every=2", "completed rounds had another value"),
        ("roundz=9", "did you mean rounds?"),
        ("rounds=abc", "rounds is abc"),
        ("rounds", "rounds cannot be read"),
    ],
)
def test_changes_that_would_falsify_the_run_are_refused(run, stop, capsys, word, phrase):
    pytest.importorskip("torch")
    stop(2)
    _, folder = run()
    before = (folder / "config.yaml").read_text()
    assert resume([str(folder), word]) == 2
    assert phrase in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize("folder", ["nothing", "empty"])
def test_a_folder_without_a_run_is_told(here, capsys, folder):
    (here / "empty").mkdir()
    assert resume([folder]) == 2
    assert f"{folder} is not a run folder" in capsys.readouterr().err
    assert list((here / "empty").iterdir()) == []


# Run in a separate process. Before or after round 2 is saved, print a line and wait for a line of input.
HOLDING_SCRIPT = """
import sys

from fedlearn.core import checkpoint
from simulations.run import main

after = sys.argv[1] == "after"
save = checkpoint.save


def held(folder, state, *args, **options):
    if state.round != 2 or after:
        path = save(folder, state, *args, **options)
    if state.round == 2:
        print("holding", flush=True)
        sys.stdin.readline()
        if not after:
            path = save(folder, state, *args, **options)
    return path


checkpoint.save = held
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def start_and_hold(here):
    """Return a function that starts a run, which waits in its second round for a line of input."""
    started = []

    def run(*words, when="before"):
        argv = [sys.executable, "-c", HOLDING_SCRIPT, when, *LONG, *words]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(argv, cwd=here, text=True, **pipes))
        said = iter(started[-1].stdout.readline, "")
        assert "holding\n" in said, started[-1].stderr.read()
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("strategy", "when"),
    [
        ("fedadam", "before"),
        ("fedavg", "after"),
        pytest.param("fedadam", "after", marks=pytest.mark.slow),
        pytest.param("fedavg", "before", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_where_an_uninterrupted_one_does(run, here, start_and_hold, summary, strategy, when):
    pytest.importorskip("torch")
    words = [f"strategy={strategy}", "strategy.clients_per_round=5"]
    process = start_and_hold(*words, when=when)
    assert resume(["run"]) == 2  # the run has not ended
    process.kill()
    process.communicate(timeout=60)
    done = checkpoint_rounds(here / "run")
    assert done[-1] == (2 if when == "after" else 1)
    assert not (here / "run/summary.json").exists()
    assert resume(["run"]) == 0
    _, whole = run(*LONG[:-1], *words, folder="whole")
    assert summary(here / "run")["parameters_sha256"] == summary(whole)["parameters_sha256"]
    assert without_times(read_history(here / "run")) == without_times(read_history(whole))


def checkpoint_rounds(folder):
    """Return the saved rounds in ascending order."""
    return sorted(int(path.stem.removeprefix("round_")) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_finishes_its_round_saves_it_and_says_how_to_go_on(here, start_and_hold, summary, number):
    pytest.importorskip("torch")
    process = start_and_hold()
    process.send_signal(number)
    assert any("stopping after this round" in line for line in iter(process.stderr.readline, ""))
    out, err = process.communicate("go on\n", timeout=60)
    assert process.returncode == 130
    assert "python -m simulations.resume run" in out
    assert "Traceback" not in out + err
    stopped = summary(here / "run")
    assert (stopped["status"], stopped["rounds"]) == ("stopped", 2)
    assert checkpoint_rounds(here / "run") == [1, 2]
    assert resume(["run"]) == 0
    assert summary(here / "run")["rounds"] == ROUNDS


def test_a_second_interrupt_stops_at_once_with_the_last_checkpoint_left(here, start_and_hold):
    pytest.importorskip("torch")
    process = start_and_hold()
    process.send_signal(signal.SIGINT)
    assert any("stopping after this round" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "to resume: python -m simulations.resume run" in err
    assert not (here / "run/summary.json").exists()
    assert checkpoint_rounds(here / "run") == [1]


def test_an_interrupt_before_the_first_round_leaves_nothing_behind(here):
    pytest.importorskip("torch")
    argv = [sys.executable, "-m", "simulations.run", *LONG, "rounds=2000"]  # this process may wait too
    process = subprocess.Popen(argv, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (here / "run/config.yaml").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (here / "run").exists() or json.loads((here / "run/summary.json").read_text())["status"] == "stopped"
