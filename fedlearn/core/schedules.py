"""Compute learning rates that change over the rounds of a run, or over the steps of a round.

Shapes: K clients in a block, S local steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fedlearn.core.named_option import NamedOption, option_name, option_values, refuse_unknown_values
from fedlearn.errors import did_you_mean, is_count, is_number, require

OVER = ("rounds", "steps")
WHOLE_RUN = "run"  # one request is the whole run, as for the baselines
_COMMON: Mapping[str, Any] = {"over": "rounds", "warmup": 0}
# name -> values with their defaults
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "constant": _COMMON,
    "linear": {**_COMMON, "end": 0.0, "rounds": None},
    "cosine": {**_COMMON, "end": 0.0, "rounds": None},
    "exponential": {**_COMMON, "gamma": 0.95},
    "step": {**_COMMON, "gamma": 0.1, "every": 10},
}
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str, Any]] = {
    "over": (lambda value: value in (*OVER, WHOLE_RUN), "rounds or steps", "rounds"),
    "warmup": (lambda value: is_number(value, at_least=0), "a number >= 0", 2),
    "end": (lambda value: is_number(value, at_least=0) and value <= 1, "a number in [0, 1]", 0.1),
    "rounds": (lambda value: value is None or is_count(value), "null, or a whole number >= 1", 20),
    "gamma": (lambda value: is_number(value, at_least=0) and 0 < value <= 1, "a number in (0, 1]", 0.5),
    "every": (lambda value: is_number(value, at_least=0) and value > 0, "a number > 0", 10),
}


def check_schedule(schedule: Any) -> None:
    """Check the name and the values of a schedule. A function is not checked.

    Raises:
        SettingError: The name is unknown, or a value is unknown or out of range.
    """
    name = option_name(schedule)
    if name is None:
        return
    near = did_you_mean(name, SCHEDULES) or "cosine"
    require(name in SCHEDULES, "schedule", name, f"one of {', '.join(SCHEDULES)}", f"schedule={near}")
    refuse_unknown_values(schedule, SCHEDULES[name], "schedule")
    for key, value in option_values(schedule).items():
        is_valid, expected, example = _CHECKS[key]
        require(is_valid(value), f"schedule.{key}", value, expected, f"'schedule={{name:{name},{key}:{example}}}'")


def over_rounds(schedule: Any, rounds: int) -> Any:
    """Return the schedule for a run with this number of rounds, unless it states its own number."""
    name = option_name(schedule)
    values = option_values(schedule)
    if name is None or "rounds" not in SCHEDULES[name] or values.get("rounds") is not None:
        return schedule
    return NamedOption({"name": name, **values, "rounds": rounds})


def over_whole_run(schedule: Any, rounds: int) -> Any:
    """Return the schedule over the steps of one request that has the steps of all rounds."""
    values = option_values(schedule)
    if schedule == "constant" or option_name(schedule) is None or values.get("over") == "steps":
        return schedule
    full = over_rounds(schedule, rounds)
    return NamedOption({"name": option_name(full), **option_values(full), "rounds": rounds, "over": WHOLE_RUN})


def rate_factors(schedule: Any, round: int, num_steps: int) -> np.ndarray:
    """Return the factor of the learning rate in each local step of a round, ``(S,)`` float64.

    With the time ``t`` (rounds or steps so far), its total ``T`` and the warm-up ``w``, the factor is ``(t + 1) /
    (w + 1)`` for ``t < w``. Afterwards, with ``p = (t - w) / (T - w)``:

    - ``constant``: 1
    - ``linear``: ``1 - (1 - end) p``
    - ``cosine``: ``end + (1 - end) (1 + cos(pi p)) / 2``
    - ``exponential``: ``gamma ** (t - w)``
    - ``step``: ``gamma ** floor((t - w) / every)``

    Args:
        schedule: name, `NamedOption`, or a function ``(round, step, num_steps) -> factor``. Rounds count from 1, and
            steps from 0.
        round: number of the round, >= 1.
        num_steps: number of local steps, >= 0.

    Raises:
        SettingError: The schedule needs the number of rounds and has none, or a factor is not a number >= 0.
    """
    if option_name(schedule) is None:
        factors_S = np.array([schedule(round, step, num_steps) for step in range(num_steps)], np.float64)
        is_valid = factors_S.shape == (num_steps,) and bool(np.all(np.isfinite(factors_S) & (factors_S >= 0)))
        require(is_valid, "schedule", factors_S.tolist()[:3], "factors >= 0 of the learning rate", "schedule=cosine")
        return factors_S
    values = {**SCHEDULES[str(option_name(schedule))], **option_values(schedule)}
    over, rounds = values["over"], values.get("rounds")
    steps_S = np.arange(num_steps, dtype=np.float64)
    if over == "steps":
        return _shape(str(option_name(schedule)), values, steps_S, num_steps)
    needs_rounds = "rounds" in values and rounds is None
    require(not needs_rounds, "schedule.rounds", None, "the number of rounds", "'schedule={name:cosine,rounds:20}'")
    time_S = steps_S * ((rounds or 1) / max(1, num_steps)) if over == WHOLE_RUN else np.full(num_steps, round - 1.0)
    return _shape(str(option_name(schedule)), values, time_S, rounds)


def _shape(name: str, values: Mapping[str, Any], time_S: np.ndarray, total: float | None) -> np.ndarray:
    warmup = values["warmup"]
    after_S = np.maximum(time_S - warmup, 0.0)
    if name in ("linear", "cosine"):
        assert total is not None
        progress_S = np.minimum(after_S / max(total - warmup, 1.0), 1.0)
        falling_S = (1 + np.cos(np.pi * progress_S)) / 2 if name == "cosine" else 1 - progress_S
        factors_S = values["end"] + (1 - values["end"]) * falling_S
    elif name == "exponential":
        factors_S = values["gamma"] ** after_S
    elif name == "step":
        factors_S = values["gamma"] ** np.floor(after_S / values["every"])
    else:
        factors_S = np.ones_like(time_S)
    return np.where(time_S < warmup, (time_S + 1) / (warmup + 1), factors_S)


@lru_cache(maxsize=4096)
def _cached_factors(schedule: Any, round: int, num_steps: int) -> np.ndarray:
    factors_S = rate_factors(schedule, round, num_steps)
    factors_S.setflags(write=False)
    return factors_S


def learning_rates(schedule: Any, learning_rate: float, rounds_K: np.ndarray, steps_K: np.ndarray) -> np.ndarray | None:
    """Return the learning rate of each local step of K clients, ``(K, S)`` float64; None if it never changes.

    Steps beyond the steps of a client have the rate 0.
    """
    if schedule == "constant":
        return None
    rates_KS = np.zeros((len(steps_K), int(steps_K.max(initial=0))))
    for k, (round, num_steps) in enumerate(zip(rounds_K.tolist(), steps_K.tolist(), strict=True)):
        rates_KS[k, :num_steps] = learning_rate * _cached_factors(schedule, round, num_steps)
    return rates_KS


def shares_rates(rates_KS: np.ndarray, steps_K: np.ndarray) -> bool:
    """Return whether all clients that take a step have the same learning rate in it."""
    takes_KS = np.arange(rates_KS.shape[1]) < steps_K[:, None]
    return bool(np.all(~takes_KS | (rates_KS == rates_KS.max(axis=0, initial=0))))
