"""A debugger works in the code of a user, and `debug=default` shows the first exception."""

from __future__ import annotations

import io
import sys
from bdb import BdbQuit

import pytest

from fedlearn.callbacks.console import Console
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.command_line import FAILED, STOPPED, exit_code
from fedlearn.runner.start import main

FACTS = {
    **{"scenario": "heart", "task": "binary", "source": "", "num_clients": 2, "examples_per_client": (1, 2), "seed": 1},
    **{"model": "mlp", "num_parameters": 1, "strategy": "fedavg", "strategy_settings": "", "cohort": "all"},
    **{"engine": "vector", "machine": "cpu", "framework": "torch", "rounds": 5, "rerun_command": ""},
}
MINE = """
from fedlearn import LocalRule, Strategy, mean, uniform

def mine(action):
    def correct(w, gradient, **rest):
        if action == "fail":
            raise RuntimeError("mine")
        breakpoint()
        return gradient
    return Strategy(select=uniform(None), local=LocalRule(correct=correct), aggregate=mean())
"""


@pytest.fixture
def words(here, monkeypatch):
    pytest.importorskip("torch")
    (here / "debugged_code.py").write_text(MINE)
    (here / "conf/strategy").mkdir(parents=True)
    (here / "conf/strategy/mine.yaml").write_text("_target_: debugged_code.mine\naction: fail\n")
    monkeypatch.syspath_prepend(str(here))
    options = ["--config-dir", "conf", "strategy=mine", "allow_targets=[debugged_code]", "hydra.run.dir=run"]
    return [*options, "scenario=diabetes", "report=false"]


def test_a_debug_run_ends_at_the_first_exception_of_a_client_with_its_traceback(words, capfd):
    assert main([*words, "debug=default"]) == FAILED
    shown = capfd.readouterr()
    assert "debugged_code.py" in shown.err
    assert "RuntimeError: mine" in shown.err
    assert "because   RuntimeError: mine" in shown.out


def test_other_runs_record_failures(words, capsys):
    assert main(words) == 3
    assert "10 of 10 clients failed" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["serial", "vector"])
def test_quitting_the_debugger_ends_the_run(words, engine, monkeypatch):
    def quit_debugger():
        raise BdbQuit

    monkeypatch.setattr(sys, "breakpointhook", quit_debugger)
    batching = ["engine.batching=map"] if engine == "vector" else []
    assert main([*words, "strategy.action=stop", f"engine={engine}", *batching]) == STOPPED


def test_the_exit_code_after_a_debugger_is_that_of_an_interrupt():
    def quit_debugger():
        raise BdbQuit

    assert exit_code(quit_debugger) == STOPPED


def test_a_breakpoint_removes_the_progress_line_and_keeps_the_hook_of_the_user(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: calls.append(console._progress.live.is_started))
    before, console = sys.breakpointhook, Console(io.StringIO(), terminal=True, width=100)
    console.on_start(RunInfo(**FACTS, folder=tmp_path))
    assert console._progress.live.is_started
    breakpoint()
    assert calls == [False]
    assert sys.breakpointhook is before
    console.close()
