from __future__ import annotations

import time

import numpy as np
import pytest

from fedlearn.callbacks import Callback, RunInfo, callback_list
from fedlearn.callbacks.callback_list import CallbackError, CallbackList
from fedlearn.core.records import Round, ServerState

PARAMS_D = np.arange(3, dtype=np.float32)


def about(folder, **changes):
    given = {
        "scenario": "heart", "task": "binary", "num_clients": 2, "model": "linear", "num_parameters": 3,
        "strategy": "fedavg", "cohort": "all", "engine": "serial", "framework": "numpy", "seed": 1, "rounds": 4,
        "folder": folder, "config": {"seed": 1, "early_stop": {"metric": None}},
    }  # fmt: skip
    return RunInfo(**(given | changes))


def a_round(number=1):
    server = {"momentum": PARAMS_D.copy()}
    state = ServerState(round=number, seed=1, params_D=PARAMS_D.copy(), server=server, select={"loss": PARAMS_D.copy()})
    return Round(state=state, cohort=(0, 1), metrics={"loss": 0.5})


class Recorder(Callback):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def on_start(self, run):
        self.log.append(f"{self.name}.start")

    def on_round(self, round):
        self.log.append(f"{self.name}.round{round.number}")

    def on_end(self, summary):
        self.log.append(f"{self.name}.end")

    def close(self):
        self.log.append(f"{self.name}.close")


class Fails(Callback):
    """Fails in one method, and records that it was closed."""

    closed = False

    def __init__(self, method, error):
        def fail(*arguments):
            raise error

        setattr(self, method, fail)
        if method != "close":
            self.close = lambda: setattr(self, "closed", True)


def call_all(called, folder):
    reasons = [called.on_start(about(folder)), called.on_round(a_round(1)), called.on_round(a_round(2))]
    called.on_end({"status": "done"})
    called.close()
    return reasons


def test_callbacks_start_in_order_and_end_in_reverse(tmp_path):
    log = []
    call_all(CallbackList({name: Recorder(name, log) for name in "ab"}), tmp_path)
    rounds = ["a.round1", "b.round1", "a.round2", "b.round2"]
    assert log == ["a.start", "b.start", *rounds, "b.end", "a.end", "b.close", "a.close"]


def test_a_callback_that_reads_files_ends_last(tmp_path):
    log = []
    tracker = Recorder("tracker", log)
    tracker.reads_run_files = True
    call_all(CallbackList({"tracker": tracker, "report": Recorder("report", log), "b": Recorder("b", log)}), tmp_path)
    assert [name for name in log if name.endswith("end")] == ["b.end", "report.end", "tracker.end"]


@pytest.mark.parametrize("error", [ValueError("no\nconnection"), OSError("network"), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("method", ["on_start", "on_round", "on_end", "close"])
def test_a_callback_that_fails_is_named_and_switched_off_and_the_others_go_on(tmp_path, capsys, caplog, method, error):
    log, failing = [], Fails(method, error)
    called = CallbackList({"tracker": failing, "other": Recorder("other", log)})
    assert call_all(called, tmp_path) == [None, None, None]
    assert log == ["other.start", "other.round1", "other.round2", "other.end", "other.close"]
    (failure,) = called.failures
    assert (failure.callback, failure.method) == ("tracker", method)
    assert failure.round == {"on_start": 0, "on_round": 1}.get(method, 2)
    assert failure.error.startswith(type(error).__name__)
    assert "\n" not in failure.error
    shown = capsys.readouterr().err.splitlines()  # other libraries may also log to standard error
    assert f" callback {failure}" in shown
    assert "   the run continues without it" in shown
    assert "tracker" in caplog.text
    assert called.add_failures({"status": "done"})["callback_failures"] == [failure.to_json()]
    assert failing.closed or method == "close"


def test_a_summary_without_failures_is_unchanged():
    assert CallbackList({}).add_failures({"status": "done"}) == {"status": "done"}


def test_the_error_of_a_callback_that_asks_for_it_ends_the_run(tmp_path):
    failing = Fails("on_round", OSError("disk full"))
    failing.ends_run_on_error = True
    called = CallbackList({"audit": failing})
    called.on_start(about(tmp_path))
    with pytest.raises(CallbackError, match="callback audit failed in round 1: OSError: disk full") as caught:
        called.on_round(a_round(1))
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_while_closing_hides_no_other_error(tmp_path, capsys):
    failing = Fails("close", OSError("disk full"))
    failing.ends_run_on_error = True
    called = CallbackList({"files": failing})
    called.close()
    assert called.failures[0].method == "close"
    assert "callback files failed while it closed" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["on_start", "on_round", "on_end", "close"])
def test_ctrl_c_inside_a_callback_passes_through_and_all_are_closed(tmp_path, method):
    log = []
    called = CallbackList({"other": Recorder("other", log), "tracker": Fails(method, KeyboardInterrupt())})

    def until_interrupted():
        try:
            called.on_start(about(tmp_path))
            called.on_round(a_round(1))
            called.on_end({})
        finally:
            called.close()

    with pytest.raises(KeyboardInterrupt):
        until_interrupted()
    assert log[-1] == "other.close"


class Ends(Callback):
    def __init__(self, at, reason):
        self.at, self.reason = at, reason

    def on_start(self, run):
        return self.reason if self.at == 0 else None

    def on_round(self, round):
        return self.reason if self.at == round.number else None


def test_the_first_reason_ends_the_run_and_all_see_the_round(tmp_path):
    log = []
    called = CallbackList({"a": Ends(1, "first"), "b": Ends(1, "second"), "c": Recorder("c", log)})
    assert call_all(called, tmp_path)[:2] == [None, "first"]
    assert "c.round1" in log
    assert CallbackList({"a": Ends(0, "before")}).on_start(about(tmp_path)) == "before"


@pytest.mark.parametrize("result", [True, 1, 0.5, "", "  ", ["stop"], np.float32(0.1)])
@pytest.mark.parametrize("at", [0, 1])
def test_a_result_that_is_no_reason_is_an_error_of_the_callback(tmp_path, capsys, result, at):
    called = CallbackList({"tracker": Ends(at, result)})
    assert call_all(called, tmp_path) == [None, None, None]
    assert "expected None, or the reason" in called.failures[0].error
    capsys.readouterr()


ARRAYS = {
    "params_D": lambda round: round.state.params_D,
    "server": lambda round: round.state.server["momentum"],
    "select": lambda round: round.state.select["loss"],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_callback_cannot_write_to_the_arrays_of_a_run(tmp_path, capsys, name):
    class Writes(Callback):
        def on_round(self, round):
            ARRAYS[name](round)[:] = 0

    called, round = CallbackList({"tracker": Writes()}), a_round(1)
    called.on_start(about(tmp_path))
    called.on_round(round)
    assert "read-only" in capsys.readouterr().err
    assert np.array_equal(ARRAYS[name](round), PARAMS_D)
    ARRAYS[name](round)[0] = 1  # the run itself may write


def test_a_callback_cannot_change_what_others_see(tmp_path):
    class Changes(Callback):
        def on_start(self, run):
            run.config["early_stop"]["metric"] = "loss"
            run.history.clear()

        def on_round(self, round):
            round.metrics.clear()
            round.state.server.clear()

        def on_end(self, summary):
            summary.clear()

    class Reads(Callback):
        def on_start(self, run):
            self.seen = [run.config["early_stop"], run.history]

        def on_round(self, round):
            self.seen += [dict(round.metrics), list(round.state.server)]

        def on_end(self, summary):
            self.seen.append(summary)

    reads = Reads()
    called = CallbackList({"first": Changes(), "reads": reads, "last": Changes()})
    called.on_start(about(tmp_path, history=[{"round": 0}]))
    called.on_round(a_round(1))
    called.on_end({"status": "done"})
    assert not called.failures
    assert reads.seen == [{"metric": None}, [{"round": 0}], {"loss": 0.5}, ["momentum"], {"status": "done"}]


def test_a_callback_that_hangs_while_it_closes_is_left_after_a_limit(tmp_path, capsys, monkeypatch):
    class Hangs(Callback):
        def close(self):
            time.sleep(60)

    monkeypatch.setattr(callback_list, "CLOSE_TIMEOUT_S", 0.1)
    log, began = [], time.monotonic()
    called = CallbackList({"other": Recorder("other", log), "tracker": Hangs()})
    called.close()
    assert time.monotonic() - began < 30
    assert log == ["other.close"]
    assert "callback tracker failed while it closed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../other/metrics.jsonl", "/etc/passwd", ".", "", "a/../../b", "link/x"])
def test_a_file_of_a_run_stays_in_its_folder(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    run = about(folder)
    assert run.file("tracker/losses.csv") == folder / "tracker/losses.csv"
    with pytest.raises(ValueError, match="a path inside the run folder"):
        run.file(name)
