from __future__ import annotations

import errno
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fedlearn.callbacks import RunInfo, checkpoints
from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER, Checkpoints
from fedlearn.callbacks.run_history import best_metrics, history_entry
from fedlearn.core import checkpoint
from fedlearn.core.layout import Layout
from fedlearn.core.records import Evaluation, Round, ServerState

LAYOUT = Layout.from_shapes([("w", (2,))])


def about(folder, history=(), metric=None, task="binary"):
    return RunInfo(
        scenario="heart", task=task, num_clients=2, model="linear", num_parameters=2, strategy="fedavg", cohort="all",
        engine="serial", framework="numpy", seed=1, rounds=9, folder=folder, layout=LAYOUT, history=history,
        start_round=len(history), config={"early_stop": {"metric": metric}},
    )  # fmt: skip


def a_round(number, value, metric="accuracy"):
    state = ServerState(round=number, seed=1, params_D=np.full(2, number, np.float32))
    counts = {"clients": (0,), "num_examples_K": np.array([3])}
    values = {"loss": 0.5, metric: value}
    per_client = {name: np.array([v]) for name, v in values.items()}
    evaluation = None if value is None else Evaluation(pooled=values, per_client=per_client, **counts)
    return Round(state=state, cohort=(0,), evaluation=evaluation)


def run_rounds(folder, values, *, first=1, history=(), end=True, metric="accuracy", select=None, **options):
    called = Checkpoints(**options)
    called.on_start(about(folder, history, select))
    for number, value in enumerate(values, start=first):
        called.on_round(a_round(number, value, metric))
    if end:
        called.on_end({})
    return checkpoint.saved_rounds(folder / CHECKPOINT_FOLDER)


CASES = {
    "the best is the first": ([0.9, 0.5, 0.6, 0.7], {}, [1, 3, 4]),
    "the best is among the last": ([0.1, 0.5, 0.9, 0.7], {}, [3, 4]),
    "the earlier wins a tie": ([0.1, 0.9, 0.5, 0.9, 0.9, 0.2], {}, [2, 5, 6]),
    "NaN is never the best": ([math.nan, 0.3, math.nan, math.nan], {}, [2, 3, 4]),
    "infinity is never the best": ([math.inf, 0.3, 0.1, 0.1, 0.1], {}, [2, 4, 5]),
    "nothing was evaluated": ([None] * 4, {}, [3, 4]),
    "rounds without evaluation": ([None, 0.9, None, 0.5, None], {}, [2, 4, 5]),
    "the best is saved between": ([0.1, 0.9, 0.5, 0.5, 0.4, 0.4, 0.3], {"every": 4}, [2, 4, 7]),
    "one is kept": ([0.9, 0.5, 0.6, 0.7], {"keep": 1}, [1, 4]),
    "five are kept": ([0.9, *[0.5] * 7], {"keep": 5}, [1, 4, 5, 6, 7, 8]),
    "a metric of which less is better": ([0.9, 0.2, 0.4, 0.5], {"metric": "loss", "select": "loss"}, [2, 3, 4]),
    "the metric of early stopping": ([0.9, 0.2, 0.4, 0.5], {"metric": "f1", "select": "f1"}, [1, 3, 4]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_newest_and_the_best_stay(tmp_path, case):
    values, options, expected = CASES[case]
    assert run_rounds(tmp_path, values, **options) == expected


values = st.lists(st.sampled_from([None, math.nan, 0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(values, st.integers(0, 8), st.integers(1, 4), st.booleans())
def test_a_resumed_run_keeps_the_best_of_an_uninterrupted_run(tmp_path_factory, values, stop, every, killed):
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    expected = run_rounds(whole, values, every=every)
    stop = min(stop, len(values))
    saved = run_rounds(resumed, values[:stop], every=every, end=not killed)
    assert len(saved) <= 3
    last = saved[-1] if saved else 0
    history = [history_entry(a_round(n, value)) for n, value in enumerate(values[:last], start=1)]
    found = run_rounds(resumed, values[last:], first=last + 1, history=history, every=every)
    assert len(found) <= 3
    assert found[-1:] == expected[-1:] or last == len(values)
    best = best_metrics([history_entry(a_round(n, value)) for n, value in enumerate(values, start=1)]).get("accuracy")
    if best:
        assert best["round"] in found
        assert best["round"] in expected


@pytest.mark.parametrize(("setting", "value"), [("every", 0), ("every", 1.5), ("every", True), ("keep", 0)])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is"):
        Checkpoints(**{setting: value})


def run_with_states(folder, cohorts, *, every=1, first=1, keep=2, num_clients=6):
    """Save one checkpoint for each cohort, and return the states after the last."""
    rng = np.random.default_rng(0)
    states = {client: {"control": rng.normal(size=3)} for client in range(num_clients)}
    called = Checkpoints(every=every, keep=keep)
    called.on_start(replace(about(folder), client_states=lambda: states))
    for number, cohort in enumerate(cohorts, start=first):
        states.update({client: {"control": rng.normal(size=3)} for client in cohort})
        called.on_round(a_round(number, None))
    called.on_end({})
    called.close()
    return states


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 3))
def test_client_states_come_back_whichever_files_have_them(tmp_path_factory, cohorts, every, keep):
    folder = tmp_path_factory.mktemp("run")
    states = run_with_states(folder, cohorts, every=every, keep=keep)
    for path in sorted((folder / CHECKPOINT_FOLDER).glob("round_*")):
        checkpoint.load(path, LAYOUT)
    _, loaded, damaged = checkpoint.load_latest(folder / CHECKPOINT_FOLDER, LAYOUT)
    assert not damaged
    assert {client: each["control"].tolist() for client, each in loaded.items()} == {
        client: each["control"].tolist() for client, each in states.items()
    }


def test_a_checkpoint_writes_only_the_client_states_that_changed(tmp_path):
    run_with_states(tmp_path, [{0}, {1}, {2}, {1, 2}], keep=1)
    rows = {path.name: len(_clients(path)) for path in sorted((tmp_path / CHECKPOINT_FOLDER).glob("clients_*"))}
    assert rows == {"clients_000001.safetensors": 6, "clients_000004.safetensors": 2}


def test_old_states_take_no_more_than_twice_the_space_of_the_current_ones(tmp_path):
    run_with_states(tmp_path, [{number % 6} for number in range(60)], keep=1)
    files = list((tmp_path / CHECKPOINT_FOLDER).glob("clients_*"))
    assert sum(len(_clients(path)) for path in files) <= 2 * 6 + 1


def _clients(path):
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor("clients")


def test_a_large_checkpoint_is_written_while_the_next_round_runs_and_its_error_ends_the_run(tmp_path, monkeypatch):
    may_write, save = threading.Event(), checkpoint.save

    def slow(*args, **options):
        assert may_write.wait(60)
        return save(*args, **options)

    monkeypatch.setattr(checkpoints, "LARGE_BYTES", 0)
    monkeypatch.setattr(checkpoint, "save", slow)
    called = Checkpoints()
    called.on_start(about(tmp_path))
    called.on_round(a_round(1, 0.5))
    assert not (tmp_path / CHECKPOINT_FOLDER).exists()
    may_write.set()
    called.on_round(a_round(2, 0.6))
    assert 1 in checkpoint.saved_rounds(tmp_path / CHECKPOINT_FOLDER)
    called.on_end({})
    assert checkpoint.saved_rounds(tmp_path / CHECKPOINT_FOLDER) == [1, 2]

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    called.on_round(a_round(3, 0.7))
    with pytest.raises(OSError, match="No space left"):
        called.on_end({})
    called.close()


def test_a_deployment_waits_for_each_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LARGE_BYTES", 0)
    called = Checkpoints()
    called.on_start(replace(about(tmp_path), deployed=True))
    called.on_round(a_round(1, 0.5))
    assert checkpoint.saved_rounds(tmp_path / CHECKPOINT_FOLDER) == [1]
    called.close()
