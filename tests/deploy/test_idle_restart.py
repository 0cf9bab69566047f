"""A process is idle only after a request, and never during a request."""

import threading

import pytest

from fedlearn import SettingError
from fedlearn.deploy import idle_restart
from fedlearn.deploy.idle_restart import Activity, wait_until_stopped


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(idle_restart.time, "monotonic", lambda: now[0])
    return now


def test_a_process_is_idle_after_the_last_of_its_requests(clock):
    activity = Activity(10)
    assert not activity.is_idle()
    clock[0] += 1000
    assert not activity.is_idle()  # it had no request, so it has nothing to free
    with activity.request():
        with activity.request():
            pass
        clock[0] += 1000
        assert not activity.is_idle()
    assert not activity.is_idle()
    clock[0] += 10
    assert activity.is_idle()
    with activity.request():
        assert not activity.is_idle()


def test_a_failed_request_counts_as_ended(clock):
    activity = Activity(10)
    with pytest.raises(ValueError, match="x"), activity.request():
        raise ValueError("x")
    clock[0] += 10
    assert activity.is_idle()


def test_zero_is_never(clock):
    activity = Activity(0)
    with activity.request():
        pass
    clock[0] += 1e9
    assert not activity.is_idle()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "x"])
def test_other_values_are_refused(value):
    with pytest.raises(SettingError, match="--idle-timeout"):
        Activity(value)


@pytest.mark.parametrize("can_restart", [True, False])
def test_an_idle_process_restarts_only_if_a_new_start_would_succeed(can_restart):
    stopped, restarts, activity = threading.Event(), [], Activity(0.01)
    asked = []

    def ask():
        asked.append(1)
        if len(asked) == 3:
            stopped.set()
        return can_restart

    with activity.request():
        pass
    wait_until_stopped(stopped, activity, ask, lambda: restarts.append(1))
    assert restarts == [1] * (3 if can_restart else 0)
