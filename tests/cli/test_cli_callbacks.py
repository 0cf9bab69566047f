"""Callbacks from the command line: defaults that can be removed, callbacks of users, and the best checkpoint."""

from __future__ import annotations

import errno
import json
import sys
from textwrap import dedent

import pytest

from fedlearn.callbacks.run_history import read_history
from fedlearn.core import checkpoint
from fedlearn.runner.start import main
from simulations.export import main as export
from simulations.predict import main as predict
from simulations.resume import main as resume

CODE = """
    import csv, json, os, signal
    from fedlearn.callbacks import Callback

    class Losses(Callback):
        def __init__(self, *, file="losses.csv"):
            self.file = file

        def on_start(self, run):
            self.path = run.file(self.file)
            rows = [(line["round"], line["train"]["loss"]) for line in run.history]
            self.path.write_text("".join(f"{number},{loss}\\n" for number, loss in rows))
            run.file("run.json").write_text(json.dumps([run.config, run.seed, run.strategy, run.start_round]))

        def on_round(self, round):
            with self.path.open("a") as file:
                csv.writer(file, lineterminator="\\n").writerow([round.number, round.metrics["loss"]])

    class Broken(Callback):
        def __init__(self, *, method):
            setattr(self, method, self.fail)

        def fail(self, *arguments):
            raise ConnectionError("no tracking server")

    class StopsAfter(Callback):
        def __init__(self, *, rounds=2):
            self.rounds = rounds

        def on_start(self, run):
            return self.reason(run.start_round)

        def on_round(self, round):
            return self.reason(round.number)

        def reason(self, number):
            return f"{self.rounds} rounds are enough" if number >= self.rounds else None

    class Zeros(Callback):
        def on_round(self, round):
            round.state.params_D[:] = 0

    class Interrupts(Callback):
        def on_round(self, round):
            os.kill(os.getpid(), signal.SIGINT)

    class NotReady(Callback):
        def __init__(self):
            raise ZeroDivisionError("no luck today")

    def function():
        return Losses()
"""
FILES = {
    "losses": "losses:\n  _target_: my_trackers.Losses\n  file: losses.csv\n",
    "zeros": "zeros:\n  _target_: my_trackers.Zeros\n",
    "nameless": "_target_: my_trackers.Losses\n",
}
ALLOW = "allow_targets=[my_trackers]"


@pytest.fixture
def run_with_user_code(run, here, monkeypatch):
    """Return a function that runs in a folder with a user's trackers and option files."""
    pytest.importorskip("torch")
    (here / "my_trackers.py").write_text(dedent(CODE))
    (here / "my_conf/callbacks").mkdir(parents=True)
    for name, text in FILES.items():
        (here / f"my_conf/callbacks/{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "my_trackers", raising=False)
    yield lambda *words, **options: run("--config-dir", "my_conf", ALLOW, *words, **options)
    sys.modules.pop("my_trackers", None)


def rows(folder):
    return [line.split(",") for line in (folder / "losses.csv").read_text().splitlines()]


@pytest.mark.parametrize("words", [["callbacks=[losses]"], ["+callbacks.losses._target_=my_trackers.Losses"]])
def test_a_tracker_of_the_user_sees_each_round_and_changes_none(run_with_user_code, summary, words):
    _, plain = run_with_user_code(folder="plain")
    code, folder = run_with_user_code(*words)
    assert code == 0
    assert rows(folder) == [[str(line["round"]), str(line["train"]["loss"])] for line in read_history(folder)]
    assert summary(folder)["parameters_sha256"] == summary(plain)["parameters_sha256"]
    assert "callback_failures" not in summary(folder)
    config, seed, strategy, start_round = json.loads((folder / "run.json").read_text())
    assert (seed, strategy, start_round) == (1, "fedavg", 0)
    assert (config["rounds"], config["local"]["batch_size"]) == (3, 32)
    assert config["callbacks"]["early_stop"] == {
        "_target_": "fedlearn.callbacks.early_stopping.EarlyStopping", "metric": None, "patience": 5, "min_delta": 0.0,
    }  # fmt: skip


def test_a_tracker_resumes_with_the_rounds_done_and_can_be_added_and_removed(run_with_user_code, capsys):
    _, folder = run_with_user_code("callbacks=[losses]", "rounds=2")
    assert resume([str(folder), "rounds=4"]) == 0
    assert len(rows(folder)) == 4
    assert resume([str(folder), "rounds=5", "callbacks.losses=null"]) == 0
    assert len(rows(folder)) == 4
    assert resume([str(folder), "rounds=6", "+callbacks.again._target_=my_trackers.Losses"]) == 0
    assert len(rows(folder)) == 6
    capsys.readouterr()
    assert resume([str(folder), "rounds=7", "callbacks.consol=null"]) == 2
    assert "did you mean callbacks.console?" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["on_start", "on_round", "on_end", "close"])
def test_a_callback_that_fails_costs_the_run_nothing_and_is_named_everywhere(
    run_with_user_code, summary, capsys, method
):
    code, folder = run_with_user_code("+callbacks.wandb={_target_: my_trackers.Broken, method: " + method + "}")
    assert code == 0
    assert (summary(folder)["status"], summary(folder)["rounds"]) == ("done", 3)
    (failure,) = summary(folder)["callback_failures"]
    assert failure == {
        "callback": "wandb", "method": method, "error": "ConnectionError: no tracking server",
        "round": {"on_start": 0, "on_round": 1}.get(method, 3),
    }  # fmt: skip
    seen = capsys.readouterr()
    assert "callback wandb failed" in seen.err
    assert method == "close" or " callbacks wandb failed" in seen.out
    assert "no tracking server" in (folder / "run.log").read_text()


def test_a_callback_that_writes_to_the_model_is_switched_off(run_with_user_code, summary):
    _, plain = run_with_user_code(folder="plain")
    code, folder = run_with_user_code("callbacks=[zeros,losses]")
    assert code == 0
    assert "read-only" in summary(folder)["callback_failures"][0]["error"]
    assert summary(folder)["parameters_sha256"] == summary(plain)["parameters_sha256"]
    assert len(rows(folder)) == 3


def test_a_callback_ends_a_run_and_a_resume_respects_it(run_with_user_code, summary, capsys):
    code, folder = run_with_user_code("+callbacks.enough._target_=my_trackers.StopsAfter", "rounds=5")
    assert code == 0
    assert (summary(folder)["status"], summary(folder)["rounds"]) == ("early_stopped", 2)
    assert summary(folder)["reason"] == "2 rounds are enough"
    capsys.readouterr()
    assert resume([str(folder)]) == 0
    assert "complete: 2 rounds are enough" in capsys.readouterr().out
    (folder / "summary.json").unlink()  # as if the process was killed before
    assert resume([str(folder)]) == 0
    assert (summary(folder)["status"], summary(folder)["rounds"]) == ("early_stopped", 2)
    assert resume([str(folder), "callbacks.enough=null"]) == 0
    assert (summary(folder)["status"], summary(folder)["rounds"]) == ("done", 5)


def test_ctrl_c_inside_a_callback_stops_after_the_round(run_with_user_code, summary, capsys):
    code, folder = run_with_user_code(
        "+callbacks.mine._target_=my_trackers.Interrupts", "rounds=5", "checkpoint_every=5"
    )
    assert code == 130
    assert summary(folder)["rounds"] == 1
    assert checkpoint.saved_rounds(folder / "checkpoints") == [1]
    assert "callback_failures" not in summary(folder)


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        (["callbacks=[losse]"], ["callbacks=[losse] is not known", "did you mean callbacks=[losses]?"]),
        (["callbacks=[zeros,losse]"], ["did you mean callbacks=[zeros,losses]?"]),
        (["callbacks=losse"], ["did you mean callbacks=losses?"]),
        (["callbacks.consol=null"], ["did you mean callbacks.console=null?"]),
        (["callbacks.checkpoints.kep=1"], ["did you mean callbacks.checkpoints.keep=1?"]),
        (["callbacks=null"], ["callbacks is null", "try       callbacks.console=null"]),
        (["callbacks.files=null"], ["callbacks.files is null", "resumed", "try  "]),
        (["~callbacks.files"], ["callbacks.files is null", "resumed", "try  "]),
        (["callbacks.checkpoints=null"], ["cannot be resumed", "try       callbacks.checkpoints.keep=1"]),
        (["callbacks.files._target_=my_trackers.Losses"], ["callbacks.files._target_ is my_trackers.Losses"]),
        (["callbacks.checkpoints.keep=0"], ["callbacks.checkpoints.keep is 0", "callbacks.checkpoints.keep=2"]),
        (["callbacks.checkpoints.every=5"], ["callbacks.checkpoints.every is 5", "try       checkpoint_every=5"]),
        (["callbacks.early_stop.metric=loss"], ["try       early_stop.metric=loss"]),
        (["callbacks.report.enabled=true"], ["try       report=true"]),
        (["callbacks.console.width=0"], ["callbacks.console.width is 0", "try       callbacks.console.width=null"]),
        (["checkpoint_every=0"], ["checkpoint_every is 0", "try       checkpoint_every=1"]),
        (["report=maybe"], ["report is maybe", "try       report=true"]),
        (["+callbacks.mine._target_=fedlearn.callbacks.run_files.RunFiles"], ["would write the same files"]),
        (["+callbacks.mine._target_=fedlearn.callbacks.checkpoints.Checkpoints"], ["would write the same files"]),
        (["+callbacks.mine=3"], ["callbacks.mine is 3", "_target_"]),
        (["callbacks=[nameless]"], ["callbacks._target_ is my_trackers.Losses", "under the name of the callback"]),
        (["callbacks=[losses]", "callbacks.losses.fil=x"], ["did you mean callbacks.losses.file=x?"]),
        (["+callbacks.mine._target_=os.system"], ["callbacks.mine._target_ is os.system", "allow_targets"]),
        (["+callbacks.mine._target_=my_trackers.function"], ["a subclass of fedlearn.callbacks.Callback"]),
        (["+callbacks.mine._target_=my_trackers.Loses"], ["did you mean Losses?"]),
        (
            ["+callbacks.mine={_target_: my_trackers.Losses, _partial_: true}"],
            ["an instance of fedlearn.callbacks.Callback"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_a_wrong_callback_is_refused_before_the_run(run_with_user_code, capsys, words, phrases):
    code, folder = run_with_user_code(*words)
    error = capsys.readouterr().err
    assert code == 2, error
    assert not folder.exists()
    for phrase in phrases:
        assert phrase in error
    assert len(error.splitlines()) <= 3


def test_code_of_the_user_is_not_imported_without_permission(run_with_user_code, capsys):
    code, _ = run_with_user_code("callbacks=[losses]", "allow_targets=[]")
    assert code == 2
    assert "try       'allow_targets=[my_trackers]'" in capsys.readouterr().err
    assert "my_trackers" not in sys.modules


def test_a_constructor_that_fails_ends_the_command_with_the_traceback_in_the_log(run_with_user_code, capsys):
    code, folder = run_with_user_code("+callbacks.mine._target_=my_trackers.NotReady")
    assert code == 3
    assert "callbacks.mine cannot be built: ZeroDivisionError: no luck today" in capsys.readouterr().err
    assert "Traceback" in (folder / "run.log").read_text()


def test_the_default_callbacks_can_be_removed(run, summary, capsys):
    pytest.importorskip("torch")
    code, folder = run("callbacks.console=null", "callbacks.report=null", "report=true", "callbacks.early_stop=null")
    assert code == 0
    assert capsys.readouterr().out == ""
    assert not (folder / "report.html").exists()
    assert summary(folder)["status"] == "done"


def test_a_sweep_and_the_print_of_the_configuration_take_callbacks(run_with_user_code, here, capsys):
    words = ["--config-dir", "my_conf", ALLOW, "scenario=diabetes", "rounds=4", "report=false"]
    assert main([*words, "-m", "num_jobs=1", "callbacks=[losses]", "callbacks.checkpoints.keep=1,3"]) == 0
    (sweep,) = (here / "multirun").iterdir()
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [len(list((job / "checkpoints").iterdir())) for job in jobs] == [1, 3]
    assert [len(rows(job)) for job in jobs] == [4, 4]
    capsys.readouterr()
    assert main([*words, "callbacks=[losses]", "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "my_trackers.Losses" in text
    assert "metric: ${early_stop.metric}" in text


# The best checkpoint. With this learning rate the error decreases until round 3 and increases afterwards.
OVERSHOOTS = ["rounds=8", "local.learning_rate=1.2"]


def best_round(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return summary["best_checkpoint"]


def test_the_best_checkpoint_of_a_stopped_run_is_that_of_an_uninterrupted_run(run, monkeypatch, summary):
    pytest.importorskip("torch")
    _, whole = run(*OVERSHOOTS, folder="whole")
    best = best_round(whole)["round"]
    assert best < 6
    assert checkpoint.saved_rounds(whole / "checkpoints") == [best, 7, 8]
    for stop in (best, best + 1):
        save = checkpoint.save

        def then_stop(folder, state, *arguments, stop=stop, save=save, **options):
            if state.round == stop:  # the lines of this round are written, but not its checkpoint
                monkeypatch.setattr(checkpoint, "save", save)
                raise KeyboardInterrupt
            return save(folder, state, *arguments, **options)

        monkeypatch.setattr(checkpoint, "save", then_stop)
        code, folder = run(*OVERSHOOTS, folder=f"stopped_{stop}")
        assert code == 130
        assert resume([str(folder)]) == 0
        assert best_round(folder) == best_round(whole)
        assert checkpoint.saved_rounds(folder / "checkpoints") == [best, 7, 8]
        name = f"checkpoints/round_{best:06d}.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_predict_and_export_take_the_best_the_last_or_a_round(run, here, capsys):
    pytest.importorskip("torch")
    _, folder = run(*OVERSHOOTS)
    best = best_round(folder)["round"]
    names = ["age", "sex", "bmi", "bp", *(f"s{number}" for number in range(1, 7))]
    (here / "x.csv").write_text(",".join(names) + "\n" + ",".join("0.1" for _ in names) + "\n")
    capsys.readouterr()
    lines = {}
    for name, round in {"best": best, "last": 8, str(best): best, "7": 7}.items():
        assert predict([str(folder), "--data", "x.csv", f"checkpoint={name}"]) == 0
        seen = capsys.readouterr()
        assert f"model of round {round} (rmse " in seen.err
        lines[name] = seen.out
    assert lines["best"] == lines[str(best)] != lines["last"]
    assert predict([str(folder), "checkpoint=best", "--data", "x.csv"]) == 0
    assert capsys.readouterr().out == lines["best"]
    assert predict([str(folder), "--data", "x.csv"]) == 0
    assert capsys.readouterr().out == lines["last"]
    assert export([str(folder), "checkpoint=best"]) == 0
    assert f"model of round {best} (rmse " in capsys.readouterr().err


WRONG_CHECKPOINTS = {
    "checkpoint=2": ["checkpoint is 2", "a saved round: 5, 6", "try       checkpoint=last"],
    "checkpoint=bset": ["checkpoint is bset", "last, best or the number of a round", "try       checkpoint=best"],
    "checkpoint=-1": ["checkpoint is -1"],
    "checkpoint=": ["checkpoint= has no value", "try       checkpoint=best"],
    "chekpoint=best": ["did you mean checkpoint=best?"],
}


def test_a_wrong_checkpoint_is_refused_with_those_that_exist(run, here, capsys):
    pytest.importorskip("torch")
    _, folder = run("rounds=6")
    names = ["age", "sex", "bmi", "bp", *(f"s{number}" for number in range(1, 7))]
    (here / "x.csv").write_text(",".join(names) + "\n" + ",".join("0.1" for _ in names) + "\n")
    capsys.readouterr()
    for word, phrases in WRONG_CHECKPOINTS.items():
        for code in (predict([str(folder), "--data", "x.csv", word]), export([str(folder), word])):
            assert code == 2
        error = capsys.readouterr().err
        for phrase in phrases:
            assert error.count(phrase) == 2
        assert len(error.splitlines()) == 6


def test_there_is_no_best_checkpoint_of_a_run_without_an_evaluation(run, here, capsys, summary, monkeypatch):
    pytest.importorskip("torch")
    from fedlearn.runner.interrupt import Interrupt

    count = iter(range(100))
    monkeypatch.setattr(
        Interrupt, "is_requested", property(lambda self: next(count) >= 2, lambda self, value: None), raising=False
    )
    code, folder = run("rounds=9", "evaluate_every=9")
    assert code == 130
    assert summary(folder)["best_checkpoint"] is None
    capsys.readouterr()
    assert export([str(folder), "checkpoint=best"]) == 2
    assert "but the run has none" in capsys.readouterr().err
    assert export([str(folder)]) == 0
    assert "model of round 2 (not evaluated)" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "status"), [("on_start", None), ("on_round", "failed"), ("on_end", None)])
def test_the_error_of_an_essential_callback_ends_the_run_with_exit_code_3(
    run_with_user_code, here, capsys, method, status
):
    (here / "my_trackers.py").write_text(dedent(CODE) + "\n\nclass Essential(Broken):\n    ends_run_on_error = True\n")
    code, folder = run_with_user_code("+callbacks.audit={_target_: my_trackers.Essential, method: " + method + "}")
    assert code == 3
    seen = capsys.readouterr()
    assert "callback audit failed" in seen.out + seen.err
    assert "can no longer be written" not in seen.err
    summary = folder / "summary.json"
    assert (json.loads(summary.read_text())["status"] if summary.exists() else None) == status
    assert resume([str(folder), "callbacks.audit=null"]) == 0
    assert json.loads(summary.read_text())["status"] == "done"


def test_a_run_folder_without_callbacks_resumes_with_the_default_ones(run, summary):
    pytest.importorskip("torch")
    from omegaconf import OmegaConf

    _, folder = run()
    settings = OmegaConf.load(folder / "config.yaml")
    del settings["callbacks"]
    OmegaConf.save(settings, folder / "config.yaml")
    assert resume([str(folder), "rounds=4", "early_stop.metric=loss"]) == 0
    assert summary(folder)["rounds"] == 4


def test_the_best_round_by_another_metric_may_have_no_checkpoint(run, here, capsys):
    pytest.importorskip("torch")
    _, folder = run(*OVERSHOOTS)
    best = best_round(folder)["round"]
    (folder / f"checkpoints/round_{best:06d}.safetensors").unlink()
    capsys.readouterr()
    assert export([str(folder), "checkpoint=best"]) == 2
    error = capsys.readouterr().err
    assert f"checkpoint is best, which is round {best} by rmse" in error
    assert "a saved round: 7, 8" in error


def test_run_files_that_cannot_be_written_end_the_run_and_the_last_checkpoint_stays(run, monkeypatch, capsys):
    pytest.importorskip("torch")
    from fedlearn.callbacks.run_files import RunFiles

    on_round = RunFiles.on_round

    def full(self, round):
        if round.number == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        on_round(self, round)

    monkeypatch.setattr(RunFiles, "on_round", full)
    code, folder = run("rounds=5")
    assert code == 3
    error = capsys.readouterr().err
    assert "run can no longer be written: No space left on device" in error
    assert "python -m simulations.resume" in error
    assert checkpoint.saved_rounds(folder / "checkpoints") == [1, 2]
    monkeypatch.setattr(RunFiles, "on_round", on_round)
    assert resume([str(folder)]) == 0
