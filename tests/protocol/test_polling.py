"""The pauses between Flower's polls."""

import time

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.supercore.inflatable import inflatable_utils

from fedlearn.flower.compat import transfers
from fedlearn.protocol import polling


def test_pauses_grow_with_the_time_waited_up_to_the_limit():
    pauses, waited = [], 0.0
    for _ in range(200):
        pauses.append(polling.poll_interval(waited, 3.0))
        # a message is found after at most one twentieth of the time waited so far
        assert pauses[-1] <= max(0.2, waited / 20)
        waited += pauses[-1]
    assert (pauses[0], pauses[-1]) == (0.2, 3.0)
    assert pauses == sorted(pauses)
    assert polling.poll_interval(0, 6.0, shortest_s=0.1) == 0.1


def test_parts_that_are_not_there_yet_are_looked_for_at_once(monkeypatch):
    defaults = dict(inflatable_utils.pull_objects.__kwdefaults__)
    monkeypatch.setattr(inflatable_utils.pull_objects, "__kwdefaults__", defaults)
    transfers.retry_parts_after(polling.INITIAL_BACKOFF_S)
    missing = ["a", "b"]

    def pull(name):
        if missing:
            missing.pop()
            raise inflatable_utils.ObjectUnavailableError(name)
        return name.encode()

    began = time.monotonic()
    assert inflatable_utils.pull_objects(["x"], pull) == {"x": b"x"}
    assert time.monotonic() - began < 0.9  # Flower itself first polls after 0.8 to 1.2 s
