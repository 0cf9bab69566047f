"""The benchmark of whole runs: phases that add up, and functions that exist."""

import json
import time
from importlib import import_module

import pytest

from simulations.benchmarks import run, run_child
from simulations.benchmarks.phases import FUNCTIONS, PHASES, PhaseClock


@pytest.fixture
def now(monkeypatch):
    """Return the time of a stopped clock, which a test advances."""
    state = {"wall": 100.0, "processor": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: state["wall"])
    monkeypatch.setattr(time, "time", lambda: state["wall"])
    monkeypatch.setattr("simulations.benchmarks.phases.processor_seconds", lambda: state["processor"])
    return state


def test_an_inner_phase_does_not_count_for_the_outer_phase(now):
    clock = PhaseClock(began=99.0)
    with clock.phase("training"):
        now["wall"] += 2
        clock.start_compilation("/jax/core/compile/backend_compile_duration", 0.0)
        now["wall"] += 5
        now["processor"] += 3
        clock.end_compilation("/jax/core/compile/backend_compile_duration", 5.0)
        now["wall"] += 1
    clock.end_round()
    assert {name: seconds for name, seconds in clock.wall.items() if seconds} == {
        "imports": 1,
        "training": 3,
        "compile": 5,
    }
    assert clock.processor["compile"] == 3
    assert clock.first_round == (9, 3)


def test_each_function_of_a_phase_exists():
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    for name, phase in FUNCTIONS.items():
        module, _, path = name.partition(":")
        owner = import_module(module)
        for part in path.split("."):
            owner = getattr(owner, part)
        assert callable(owner)
        assert phase in PHASES


def test_the_workloads_are_known():
    from simulations.benchmarks.workloads import WORKLOADS

    assert tuple(WORKLOADS) == run_child.WORKLOADS


@pytest.mark.slow
@pytest.mark.cli
@pytest.mark.parametrize("scenario", ["heart", "w1"])
def test_the_phases_of_a_run_add_up_to_its_total(scenario):
    pytest.importorskip("torch")
    began = time.time()
    measured = run.run_once(scenario, "torch", ["rounds=2", "report=false"])
    total = time.time() - began - measured.import_framework[0]
    assert sum(measured.wall.values()) == pytest.approx(total, abs=0.1 * total + 0.2)
    assert all(measured.wall[name] > 0 for name in ("imports", "build", "training", "predict", "checkpoints"))
    assert 0 < measured.first_round[1] < sum(measured.processor.values())
    assert measured.round_seconds > 0
    assert json.dumps(measured.wall)
