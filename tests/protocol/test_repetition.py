"""Requests without a response are sent again until their deadline, and never without end."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from fedlearn.protocol import repetition
from fedlearn.protocol.repetition import MAX_ERRORS, REPORT_INTERVAL_S, Repetition


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that moves only when a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(repetition.time, "monotonic", lambda: now[0])
    return now


def sent(clock, id="a", node_id=7, deadline=600.0, sent_at_unix=50.0):
    ends = clock[0] + deadline

    class Sent(SimpleNamespace):
        @property
        def remaining_s(self):
            return ends - clock[0]

    return Sent(request=SimpleNamespace(id=id), node_id=node_id, sent_at_unix=sent_at_unix)


def test_pauses_grow_and_a_node_that_reports_errors_again_and_again_is_given_up(clock):
    repeated, request, pauses = Repetition(), sent(clock), []
    while repeated.accepts(request, is_error=True):
        repeated.add(request, "it fails")
        start = clock[0]
        while not repeated.take_due(lambda: {7}):
            clock[0] += 0.25
        pauses.append(clock[0] - start)
    assert len(pauses) == MAX_ERRORS - 1
    assert pauses == sorted(pauses)
    assert sum(pauses) < 40


def test_a_disconnected_node_is_waited_for_until_the_deadline_and_named_in_time(clock):
    lines = []
    repeated, request = Repetition(report=lambda node_id, text: lines.append((clock[0], node_id, text))), sent(clock)
    for _ in range(100):  # disconnections are no errors of the node
        assert repeated.accepts(request, is_error=False)
    repeated.add(request, "it fails")
    while not repeated.take_expired():
        assert repeated.take_due(set) == []
        clock[0] += 0.5
    assert 598 <= clock[0] - 1000 <= 600
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(lines)]
    assert max(gaps) <= REPORT_INTERVAL_S + 1.5
    assert not repeated.waiting


def test_a_request_is_lost_with_the_connection_over_which_it_was_sent(clock):
    repeated = Repetition(connected_since=lambda: {7: 60.0, 8: 40.0})
    in_flight = {"m": sent(clock, sent_at_unix=50.0), "n": sent(clock, sent_at_unix=70.0), "o": sent(clock, node_id=8)}
    assert repeated.interrupted(in_flight) == ["m"]


def test_a_request_that_completes_is_forgotten(clock):
    repeated, request = Repetition(), sent(clock)
    repeated.accepts(request, is_error=True)
    repeated.add(request, "it fails")
    repeated.forget("a")
    clock[0] += 100
    assert repeated.take_due(lambda: {7}) == []
    assert repeated.take_expired() == []


def test_no_request_is_sent_again_at_its_deadline(clock):
    request = sent(clock, deadline=0.5)
    assert not Repetition().accepts(request, is_error=False)
