import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.callbacks.early_stopping import EarlyStop
from fedlearn.errors import SettingError


def history(values, metric="loss"):
    none_for_nan = [None if value is not None and math.isnan(value) else value for value in values]
    return [{"round": r, "test": {metric: value}} for r, value in enumerate(none_for_nan, start=1)]


def first_stop(stop, lines):
    return next((k for k in range(1, len(lines) + 1) if stop.reason(lines[:k])), None)


def test_it_stops_after_patience_evaluations_without_a_gain():
    stop = EarlyStop("loss", 2, task="binary")
    assert first_stop(stop, history([0.9, 0.8, 0.8, 0.7, 0.7, 0.75, 0.6])) == 6


def test_accuracy_counts_upwards():
    assert first_stop(EarlyStop("accuracy", 2, task="binary"), history([0.5, 0.6, 0.55, 0.6], "accuracy")) == 4


def test_a_gain_of_no_more_than_min_delta_is_none():
    lines = history([1.0, 0.75, 0.75])
    assert first_stop(EarlyStop("loss", 2, 0.25, task="binary"), lines) == 3
    assert first_stop(EarlyStop("loss", 2, 0.125, task="binary"), lines) is None


def test_nan_is_no_gain_and_the_first_defined_value_is_one():
    assert (
        first_stop(EarlyStop("auc", 3, task="binary"), history([math.nan, math.nan, 0.5, math.nan, 0.4], "auc")) is None
    )
    assert first_stop(EarlyStop("auc", 2, task="binary"), history([math.nan, math.nan, 0.5], "auc")) == 2


def test_rounds_without_evaluation_do_not_count():
    lines = history([0.5, 0.6])
    lines[1:1] = [{"round": 10, "test": None}] * 20
    assert EarlyStop("loss", 2, task="binary").reason(lines) is None


def test_the_reason_names_the_best_value_and_its_round():
    reason = EarlyStop("loss", 2, task="binary").reason(history([0.9, 0.25, 0.8, 0.7]))
    assert reason == "loss has not improved for 2 evaluations (best 0.25 at round 2)"


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 5))
def test_it_never_stops_before_patience_evaluations_after_the_best(values, patience):
    stop = EarlyStop("loss", patience, task="binary")
    when = first_stop(stop, history(values))
    if when is not None:
        before = values[:when]
        assert when - 1 - before.index(min(before)) == patience


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_steady_improvement_never_stops(values):
    falling = sorted(set(values), reverse=True)
    assert first_stop(EarlyStop("loss", 1, task="regression"), history(falling)) is None


@pytest.mark.parametrize(
    ("arguments", "setting", "fix"),
    [
        (("acuracy", 3), "early_stop.metric", "early_stop.metric=accuracy"),
        (("rmse", 3), "early_stop.metric", "early_stop.metric="),
        (("loss", 0), "early_stop.patience", "early_stop.patience=5"),
        (("loss", 3, -1.0), "early_stop.min_delta", "early_stop.min_delta=0.001"),
    ],
)
def test_a_wrong_setting_is_named_with_one_thing_to_try(arguments, setting, fix):
    with pytest.raises(SettingError) as error:
        EarlyStop(*arguments, task="binary")
    assert error.value.setting == setting
    assert error.value.fix.startswith(fix)
