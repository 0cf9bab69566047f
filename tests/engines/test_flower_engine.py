"""Flower's own simulation runtime gives the results of the serial engine, bit for bit."""

from __future__ import annotations

import sys
import time
from functools import partial

import numpy as np
import pytest
from needs import needs

pytest.importorskip("flwr", reason="Flower is not installed")
pytest.importorskip("ray", reason="ray is not installed")
import ray

import strategies
from fedlearn import LocalSettings, Schedule, SettingError, Strategy, everyone, federate, serial, start
from fedlearn.core import Request
from fedlearn.core.records import Failure
from fedlearn.engines.flower import flower
from fedlearn.engines.flower_simulation import SimulationError
from fedlearn.runner.instantiation import rebuild_scenario

needs("torch", reason="torch is not installed")

PARTITION = {"_target_": "fedlearn.data.partition.Dirichlet", "num_clients": 5}
DIGITS = {"_target_": "simulations.scenarios.digits.digits", "framework": "torch", "partition": PARTITION}
LOCAL = LocalSettings(learning_rate=0.1)


@pytest.fixture(scope="module")
def scenario():
    return rebuild_scenario(DIGITS, ())


@pytest.fixture(scope="module")
def engine(scenario):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    built = flower(scenario.data, scenario.trainer, partial(rebuild_scenario, DIGITS, ()), num_workers=2, timeout=300.0)
    yield built
    built.close()
    assert not built._simulation._thread.is_alive()
    assert not ray.is_initialized()


def rounds_of(engine, strategy, params_D):
    engine.client_states.clear()
    state = start(strategy, params_D, engine, seed=1)
    return list(federate(strategy, engine, state, schedule=Schedule(rounds=2), local=LOCAL))


NAMES = ("fedprox", "scaffold", "fedper", "ditto")


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_that_of_serial_bit_for_bit(engine, scenario, name):
    here, params_D = serial(scenario.data, scenario.trainer), scenario.trainer.init(1)
    strategy = getattr(strategies, name)(clients_per_round=3)
    ours, theirs = rounds_of(here, strategy, params_D), rounds_of(engine, strategy, params_D)
    for item, other in zip(ours, theirs, strict=True):
        assert np.array_equal(item.state.params_D, other.state.params_D)
        assert item.metrics == other.metrics
        for name in ("cohort", "failures", "num_examples", "bytes_up", "bytes_down"):
            assert getattr(item, name) == getattr(other, name)
    assert here.client_states.keys() == engine.client_states.keys()
    for client, memory in here.client_states.items():
        assert all(np.array_equal(memory[name], engine.client_states[client][name]) for name in memory)
    current = [list(each.evaluate(params_D, [0, 1, 2, 3, 4], strategy)) for each in (here, engine)]
    assert all(np.allclose(item.outputs, other.outputs, atol=1e-6) for item, other in zip(*current, strict=True))


def test_nodes_evaluate_what_serial_evaluates(engine, scenario):
    params_D, clients = scenario.trainer.init(1), [4, 0, 2]
    expected = list(serial(scenario.data, scenario.trainer).evaluate(params_D, clients))
    found = list(engine.evaluate(params_D, clients))
    assert [item.client for item in found] == [0, 2, 4]
    for item, other in zip(found, expected, strict=True):
        assert np.allclose(item.outputs, other.outputs, atol=1e-6)
        assert np.array_equal(item.targets, other.targets)


def test_a_client_that_fails_is_named_with_its_stage_and_reason(engine, scenario):
    params_D = np.full_like(scenario.trainer.init(1), np.nan)
    order, strategy = Request(round=1, seed=1, params_D=params_D, local=LOCAL), Strategy(select=everyone())
    found = list(engine.fit(order, strategy, [3, 1]))
    expected = list(serial(scenario.data, scenario.trainer).fit(order, strategy, [3, 1]))
    assert found == expected
    assert [(item.client, item.stage) for item in found if isinstance(item, Failure)] == [(1, "update"), (3, "update")]


def test_waiting_ends_with_a_named_cause(engine, scenario, monkeypatch):
    monkeypatch.setattr(engine._simulation, "_timeout_s", 1e-6)
    began = time.monotonic()
    with pytest.raises(SimulationError, match=r"2 of 2 nodes have not responded in 1e-06 s\n.*engine.timeout=1e-05"):
        list(engine.evaluate(scenario.trainer.init(1), [0, 1]))
    assert time.monotonic() - began < 120


@pytest.mark.parametrize(("name", "value"), [("num_workers", 0), ("timeout", 0)])
def test_settings_out_of_range_are_refused_before_anything_starts(scenario, name, value):
    with pytest.raises(SettingError, match=name):
        flower(scenario.data, scenario.trainer, partial(rebuild_scenario, DIGITS, ()), **{name: value})
