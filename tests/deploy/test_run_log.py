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
