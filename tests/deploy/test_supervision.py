"""Processes are watched by their ability to work: ended, hanging and failing ones are named and restarted."""

import os
import signal
import sys

import pytest

from fedlearn.deploy import supervision
from fedlearn.deploy.processes import MAX_RESTARTS, Child, ChildError, Children
from fedlearn.deploy.supervision import Watch

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that moves only when a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def sleeper(tmp_path):
    with Children(grace_s=1.0) as children:
        yield children.start(Child("the trainer", SLEEP, tmp_path / "log"))


def lines(capsys):
    return [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]


def test_a_problem_is_named_once_and_its_end_too(clock, capsys):
    problem = ["it does not answer"]
    watch = Watch("the trainer", lambda: problem[0])
    for _ in range(5):
        watch.check()
        clock[0] += 4
    problem[0] = ""
    watch.check()
    watch.check()
    assert lines(capsys) == [
        "the trainer does not work: it does not answer",
        "the trainer works again after 20 s",
    ]


def test_a_short_problem_is_no_line(clock, capsys):
    problem = ["it does not answer"]
    watch = Watch("the trainer", lambda: problem[0])
    watch.check()
    clock[0] += supervision.REPORT_AFTER_S - 1
    watch.check()
    problem[0] = ""
    watch.check()
    assert lines(capsys) == []


def test_a_process_that_hangs_is_killed_and_restarted(sleeper, clock, capsys):
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    before = sleeper.process.pid
    watch = Watch("the trainer", lambda: "it does not answer" if sleeper.process.pid == before else "", sleeper)
    for _ in range(20):
        watch.check()
        clock[0] += 4
    assert sleeper.process.pid != before
    assert sleeper.exit_code is None
    assert watch.works
    text = lines(capsys)
    assert text[0] == "the trainer does not work: it does not answer"
    assert text[-1].startswith("the trainer works again after")


def test_a_process_that_ends_is_restarted_at_once_and_then_with_growing_delays(sleeper, clock, capsys, monkeypatch):
    delays = []
    watch = Watch("the trainer", lambda: "", sleeper)
    for _ in range(3):
        sleeper.process.kill()
        sleeper.process.wait(60)
        start = clock[0]
        while sleeper.exit_code is not None:
            watch.check()
            clock[0] += 0.25
        delays.append(clock[0] - start - 0.25)
        watch.check()
    assert delays == [0, 1, 2]
    assert lines(capsys)[0] == "the trainer ended with code -9; it is restarted now"


def test_a_process_that_ends_again_and_again_is_given_up(tmp_path, clock):
    child = Child("flapping", [sys.executable, "-S", "-c", "pass"], tmp_path / "log")
    child.start()
    watch = Watch("flapping", lambda: "", child)

    def watch_for_long():
        for _ in range(100):
            child.process.wait(60)
            watch.check()
            clock[0] += 1

    with pytest.raises(ChildError, match=f"flapping ended {MAX_RESTARTS + 1} times"):
        watch_for_long()
