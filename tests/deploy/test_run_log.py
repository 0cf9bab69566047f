"""Following a run of a coordinator that the tests imitate."""

import threading

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.deploy import run_log
from fedlearn.deploy.coordinator_side.control_api import RunStatus


class Stuck:
    """A coordinator that accepts each run and starts none."""

    stopped = ()
    over = threading.Event()

    def __init__(self, address, keys):
        pass

    def log(self, run_id, after):
        Stuck.over.wait(600)
        yield ("", 0.0)

    def status(self, run_id):
        return RunStatus("pending")

    def node_states(self):
        return []

    def successor(self, run_id):
        return None

    def stop(self, run_id):
        Stuck.stopped = (*Stuck.stopped, run_id)

    def close(self):
        pass


def test_a_run_that_is_never_begun_is_taken_back_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(run_log, "CoordinatorClient", Stuck)
    monkeypatch.setattr(run_log, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(run_log, "SILENCE_TIMEOUT_S", 0.2)
    try:
        with pytest.raises(run_log.RunStartTimeout, match="has not started the run within"):
            run_log.Follower("localhost:1", tmp_path, 1.0).follow(7)
        assert Stuck.stopped == (7,)
    finally:
        Stuck.over.set()


class Hostile(Stuck):
    """A coordinator whose run prints control characters, cut at any place."""

    def log(self, run_id, after):
        yield from [("\x1b[1mround 1\x1b[0m\n\x1b[2", 1.0), ("J\x1b]0;title\x07 done\r\nrun        a\x1b[2Jb\n", 2.0)]

    def status(self, run_id):
        return RunStatus("finished", "failed", "fedlearn exit 3")


def test_a_run_cannot_control_the_terminal_of_its_submitter(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_log, "CoordinatorClient", Hostile)
    follower = run_log.Follower("localhost:1", tmp_path, 1.0)
    assert follower.follow(7) == 3
    assert capsys.readouterr().out.splitlines() == [
        "\x1b[1mround 1\x1b[0m",
        "[2J]0;title done",
        "run        a[2Jb",
    ]
    assert follower.folder == "a [2Jb"


@pytest.mark.parametrize("usual_s", [0.0, 1.0, 3.9, 4.9, 6.0, 7.4, 20.0, 60.0])
def test_a_silence_is_named_as_soon_as_it_is_longer_than_usual(tmp_path, monkeypatch, usual_s):
    now, looks = [1000.0], []
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    follower = run_log.Follower("coordinator:8000", tmp_path, 1.0)
    follower._reported_at = checked_at = now[0]
    follower._pauses.extend([usual_s] * 5 + [usual_s + 15.0] * 10)  # most rounds had a fault
    while now[0] < 1200.0:
        now[0] += 0.3
        if follower._is_check_due(checked_at):
            looks.append(now[0] - 1000.0)
            checked_at = now[0]
    named = next(look for look in looks if look > follower._slow_s)
    assert named <= max(10.0, 2.0 * usual_s) + 0.7
    assert named <= 15.0 or usual_s > 7.2
    assert len(looks) <= 21
