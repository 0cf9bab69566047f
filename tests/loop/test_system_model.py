"""The times and dropouts of the system model follow from the seed alone."""

from math import inf

import numpy as np
import pytest

from fedlearn.errors import DataError, SettingError
from fedlearn.loop import SystemModel, constant, lognormal, trace
from fedlearn.loop.system_model import NOT_CONNECTED, Arrival, Workload, none

LOAD = Workload(num_steps=20, bytes_down=3000, bytes_up=500)


def arrivals(system, clients=range(2000), round=1, seed=1, clock=0.0):
    return [system.arrival(seed, client, round, LOAD, clock=clock) for client in clients]


def devices(tmp_path, text):
    path = tmp_path / "devices.csv"
    path.write_text(text)
    return str(path)


def test_an_order_takes_download_and_steps_and_upload():
    system = constant(seconds_per_step=0.5, download=1000, upload=100)
    assert system.arrival(1, 7, 3, LOAD) == Arrival(3000 / 1000 + 20 * 0.5 + 500 / 100)
    assert constant(seconds_per_step=0.5, download=None, upload=None).arrival(1, 7, 3, LOAD) == Arrival(10.0)
    assert none().arrival(1, 7, 3, LOAD) == Arrival(1.0)


def test_equal_seeds_give_equal_fates_and_others_do_not():
    system = lognormal(dropout=0.2, available=0.9)
    assert arrivals(system) == arrivals(system)
    assert arrivals(system) != arrivals(system, seed=2)
    assert arrivals(system) != arrivals(system, round=2)


def test_a_client_keeps_its_speed_and_orders_differ_by_the_jitter():
    steady = lognormal(sigma=1.0, jitter=0.0)
    assert arrivals(steady, round=1) == arrivals(steady, round=9)
    jittery = lognormal(sigma=0.0, jitter=0.3, download=None, upload=None)
    ratios = np.log([fate.seconds / (20 * 0.1) for fate in arrivals(jittery)])
    assert abs(ratios.mean()) < 0.02
    assert abs(ratios.std() - 0.3) < 0.02


def test_the_median_client_is_as_fast_as_was_said_and_one_in_six_is_e_times_slower():
    seconds = np.array([fate.seconds for fate in arrivals(lognormal(jitter=0.0, download=None, upload=None))])
    assert np.median(seconds) == pytest.approx(20 * 0.1, rel=0.1)
    assert np.mean(seconds > np.e * 20 * 0.1) == pytest.approx(0.159, abs=0.03)


def test_shares_of_clients_are_absent_or_drop_out_as_was_said():
    lost = [fate.failure_reason for fate in arrivals(constant(available=0.8, dropout=0.25))]
    assert lost.count(NOT_CONNECTED) / 2000 == pytest.approx(0.2, abs=0.03)
    assert sum("dropped out" in why for why in lost) / 2000 == pytest.approx(0.8 * 0.25, abs=0.03)


def test_whoever_is_absent_costs_no_time_and_a_dropout_as_much_as_its_answer_would_have():
    whole = constant().arrival(1, 0, 1, LOAD).seconds
    by_cause = {fate.failure_reason: fate.seconds for fate in arrivals(constant(available=0.5, dropout=0.5))}
    assert sorted(by_cause.values()) == [0.0, whole, whole]


def test_nobody_is_waited_for_beyond_the_deadline():
    assert constant(seconds_per_step=1, deadline=5.0).arrival(1, 0, 1, LOAD) == Arrival(5.0, "no response within 5 s")


def test_a_traced_device_has_the_speed_and_the_windows_of_its_rows(tmp_path):
    path = devices(
        tmp_path,
        "client,seconds_per_step,download,upload,from,until\n4,0.5,,100,10,40\n4,,,,60,90\n8,2,1000,,,\n".replace(
            "4,,,,60", "4,0.5,,100,60"
        ),
    )
    system = trace(path=path, period=100.0)
    assert system.arrival(1, 1, 1, LOAD) == Arrival(3 + 40.0)  # the second device, always available
    assert system.arrival(1, 0, 1, LOAD) == Arrival(10 + 15.0)  # waits for its availability window
    assert system.arrival(1, 0, 1, LOAD, clock=20.0) == Arrival(15.0)
    assert system.arrival(1, 0, 1, LOAD, clock=30.0) == Arrival(
        10.0, "the client left after 10 s, before the end of its work"
    )
    assert system.arrival(1, 0, 1, LOAD, clock=95.0) == Arrival(15 + 15.0)  # the next day
    assert system.arrival(1, 2, 1, LOAD) == system.arrival(1, 0, 1, LOAD)  # devices are assigned cyclically


def test_without_a_period_a_device_that_has_gone_does_not_come_back(tmp_path):
    path = devices(tmp_path, "client,seconds_per_step,download,upload,from,until\n0,0.1,,,10,40\n")
    assert trace(path=path, period=None).arrival(1, 0, 1, LOAD, clock=50.0) == Arrival(0.0, NOT_CONNECTED)


@pytest.mark.parametrize(
    "text",
    ["", "client,seconds_per_step\n1,2\n", "client,seconds_per_step,download,upload\n1,fast,,\n",
     "client,seconds_per_step,download,upload\n1,-2,,\n",
     "client,seconds_per_step,download,upload,from,until\n1,2,,,9,3\n"],
)  # fmt: skip
def test_a_trace_that_does_not_say_what_it_must_is_refused_by_name(tmp_path, text):
    with pytest.raises(DataError, match=r"devices\.csv"):
        trace(path=devices(tmp_path, text))


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: constant(seconds_per_step=-1), "seconds_per_step"),
        (lambda: constant(download=0), "download"),
        (lambda: constant(upload=inf), "upload"),
        (lambda: lognormal(sigma=-0.1), "sigma"),
        (lambda: lognormal(available=0), "available"),
        (lambda: lognormal(dropout=1.0), "dropout"),
        (lambda: constant(deadline=0), "deadline"),
        (lambda: constant(min_completed=0), "min_completed"),
        (lambda: trace(), "path"),
        (lambda: trace(path="x", period=-1), "period"),
        (lambda: SystemModel(dropout=2), "dropout"),
    ],
)
def test_a_setting_out_of_range_is_refused(make, setting):
    with pytest.raises(SettingError, match=f"^{setting} is"):
        make()
