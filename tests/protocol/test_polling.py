"""The pauses between Flower's polls."""

import time

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.supercore.inflatable import inflatable_utils

from fedlearn.flower import compat
from fedlearn.protocol import polling


@pytest.fixture
def slept(monkeypatch):
    pauses = []
    monkeypatch.setattr(polling.time, "sleep", pauses.append)
    return pauses


def test_pauses_grow_with_the_time_waited_up_to_what_was_asked_for(slept):
    clock = polling.PollingClock()
    for _ in range(200):
        clock.sleep(3)
    assert slept[0] == 0.2
    assert slept[-1] == 3
    assert slept == sorted(slept)
    waited = 0.0
    for pause in slept:
        # a message is found after at most one twentieth of the time waited so far
        assert pause <= max(0.2, waited / 20)
        waited += pause


def test_another_kind_of_wait_begins_with_short_pauses_again(slept):
    clock = polling.PollingClock()
    for seconds in [3] * 100 + [0.5]:
        clock.sleep(seconds)
    assert slept[-1] == pytest.approx(0.5 / 15)
    clock.sleep(0.01)
    assert slept[-1] == pytest.approx(0.01 / 15)


def test_a_clock_is_pythons_time_in_all_else():
    assert polling.PollingClock().monotonic() > 0


def test_this_flower_sleeps_where_we_think_it_does(monkeypatch):
    for module, set_clock in (
        ("flwr.supernode.start_client_internal", compat.set_supernode_clock),
        ("flwr.supercore.superexec.run_superexec", compat.set_superexec_clock),
    ):
        found = pytest.importorskip(module)
        monkeypatch.setattr(found, "time", found.time)  # restored after the test
        clock = polling.PollingClock()
        set_clock(clock)
        assert found.time is clock


def test_parts_that_are_not_there_yet_are_looked_for_at_once(monkeypatch):
    defaults = dict(inflatable_utils.pull_objects.__kwdefaults__)
    monkeypatch.setattr(inflatable_utils.pull_objects, "__kwdefaults__", defaults)
    compat.retry_parts_after(polling.INITIAL_BACKOFF_S)
    missing = ["a", "b"]

    def pull(name):
        if missing:
            missing.pop()
            raise inflatable_utils.ObjectUnavailableError(name)
        return name.encode()

    began = time.monotonic()
    assert inflatable_utils.pull_objects(["x"], pull) == {"x": b"x"}
    assert time.monotonic() - began < 0.9  # Flower itself first polls after 0.8 to 1.2 s
