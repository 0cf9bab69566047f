from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.callbacks import RunInfo
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
