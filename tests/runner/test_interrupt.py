"""Ctrl-C: a request reaches the run, and the series of runs around it."""

import signal

import pytest

from fedlearn.runner.interrupt import SIGNALS, Interrupt


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_stops_at_once(number, capsys):
    handler = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.is_requested
        signal.raise_signal(number)
        assert interrupt.is_requested
        assert "stopping after this round" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is handler


def test_a_request_inside_reaches_the_contexts_around():
    with Interrupt(at_once=True) as series:
        with Interrupt() as first:
            pass
        assert not series.is_requested
        with Interrupt() as second:
            signal.raise_signal(signal.SIGINT)
    assert (first.is_requested, second.is_requested, series.is_requested) == (False, True, True)


def test_a_series_stops_at_the_first_signal_and_remembers_it():
    with Interrupt(at_once=True) as series:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert series.is_requested
