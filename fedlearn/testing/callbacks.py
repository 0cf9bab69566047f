"""Check a callback on a small federation."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedlearn.algorithm.client_selection import uniform
from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.callback_list import CLOSE_TIMEOUT_S, time_limit
from fedlearn.callbacks.read_only import read_only_round, read_only_run
from fedlearn.callbacks.run_history import history_entry
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.summary import summarise
from fedlearn.core.records import Round
from fedlearn.engines.base import serial
from fedlearn.loop.scenario import Scenario, judge
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.training_loop import federate, start
from fedlearn.testing.problems import LOCAL_SETTINGS, LinearTrainer, linear_problem

NUM_ROUNDS = 6
SCHEDULE = Schedule(rounds=NUM_ROUNDS, evaluate_every=2)
NUM_FEATURES = 3


def check_callback(callback: Callback | Callable[[], Callback]) -> None:
    """Check that a callback observes a run, and neither changes nor endangers it.

    The check runs six rounds of a small federation without a terminal, and evaluates every second round. It resumes
    after each round. It also ends a run early, runs without a round, and runs with undefined metrics. It calls
    ``close`` twice. The model must be bit-identical with and without the callback.

    Args:
        callback: a function or class that creates the callback, or a new callback, which is copied.

    Raises:
        AssertionError: a guarantee does not hold; the message names it.
    """
    create = callback if callable(callback) else partial(_copy, callback)
    assert isinstance(create(), Callback), "a callback must be a subclass of fedlearn.callbacks.Callback"
    assert isinstance(create().ends_run_on_error, bool), "ends_run_on_error must be True or False"
    with _without_terminal():
        rounds = list(_federation())
        _call(create(), "close", "without a start")
        last_round = _check_whole_run(create, rounds)
        for start_round in range(last_round + 1):
            _check_resume(create, rounds, start_round, last_round)
        for status, num_rounds in (("stopped", 3), ("failed", 1), ("done", 0)):
            _check_early_end(create, rounds[:num_rounds], status)
        _check_undefined_metrics(create, rounds)


def _copy(callback: Callback) -> Callback:
    try:
        return deepcopy(callback)
    except Exception as error:
        fix = f"check_callback(lambda: {type(callback).__name__}(...))"
        raise AssertionError(f"a callback must be copyable before its start: {error}\n  advice    {fix}") from error


def _check_whole_run(create: Callable[[], Callback], rounds: Sequence[Round]) -> int:
    """Run the federation with the callback, and return the number of the last round."""
    with TemporaryDirectory() as folder:
        run, called = _run_info(Path(folder)), create()
        reason, done = _call(called, "on_start", "at the start", run), []
        for round in _federation():
            done.append(round)
            reason = reason or _call(called, "on_round", f"in round {round.number}", round)
            if reason:
                break
        assert reason is None or done, "on_start must not end a run that has no rounds yet"
        same = np.array_equal(np.asarray(done[-1].state.params_D), np.asarray(rounds[len(done) - 1].state.params_D))
        assert same, "the model must be bit-identical with and without the callback"
        _end(called, run, done, "early_stopped" if reason else "done", reason or "")
    return done[-1].number


def _check_resume(create: Callable[[], Callback], rounds: Sequence[Round], start_round: int, last_round: int) -> None:
    """Stop a run after a round whose checkpoint is missing, and resume it with a new callback."""
    with TemporaryDirectory() as folder:
        run, killed = _run_info(Path(folder)), create()
        _call(killed, "on_start", "at the start", run)
        for round in rounds[: min(start_round + 1, last_round)]:
            _call(killed, "on_round", f"in round {round.number}", round)
        resumed, where = create(), f"after a resume from round {start_round}"
        run = replace(run, start_round=start_round, history=[history_entry(round) for round in rounds[:start_round]])
        reason, number = _call(resumed, "on_start", where, run), start_round
        for round in rounds[start_round:]:
            if reason:
                break
            reason, number = _call(resumed, "on_round", where, round), round.number
        expected = f"{where}, the run must end after round {last_round}, as without a stop; it ended after {number}"
        assert number == last_round, f"{expected}\n  advice    read run.history in on_start"
        _end(resumed, run, rounds[:number], "early_stopped" if reason else "done", reason or "")
        _call(killed, "close", "of a killed run")


def _check_early_end(create: Callable[[], Callback], rounds: Sequence[Round], status: str) -> None:
    with TemporaryDirectory() as folder:
        run, called = _run_info(Path(folder)), create()
        _call(called, "on_start", "at the start", run)
        for round in rounds:
            _call(called, "on_round", f"in round {round.number}", round)
        _end(called, run, rounds, status, "the check ended the run")


def _check_undefined_metrics(create: Callable[[], Callback], rounds: Sequence[Round]) -> None:
    undefined = [_with_undefined_metrics(round) for round in rounds[:2]]
    with TemporaryDirectory() as folder:
        run, called = _run_info(Path(folder)), create()
        _call(called, "on_start", "at the start", run)
        for round in undefined:
            _call(called, "on_round", f"in round {round.number} with undefined metrics (NaN)", round)
        _end(called, run, undefined, "done", "")


def _with_undefined_metrics(round: Round) -> Round:
    evaluation = round.evaluation and replace(
        round.evaluation, pooled=dict.fromkeys(round.evaluation.pooled, float("nan"))
    )
    return replace(round, metrics={"loss": float("nan")}, evaluation=evaluation)


def _federation() -> Iterator[Round]:
    data, trainer = linear_problem(num_features=NUM_FEATURES), LinearTrainer(NUM_FEATURES)
    engine, strategy = serial(data, trainer), Strategy(select=uniform(None))
    evaluate = judge(Scenario(name="linear", data=data, trainer=trainer, model="linear"))
    state = start(strategy, trainer.init(1), engine, seed=1)
    yield from federate(strategy, engine, state, schedule=SCHEDULE, local=LOCAL_SETTINGS, evaluate=evaluate)


def _run_info(folder: Path) -> RunInfo:
    trainer = LinearTrainer(NUM_FEATURES)
    config = {"seed": 1, "rounds": NUM_ROUNDS, "strategy": {"_target_": "strategies.fedavg"}, "scenario": {}}
    return RunInfo(
        scenario="linear",
        task="regression",
        num_clients=6,
        model="linear 3-1",
        num_parameters=trainer.layout.num_parameters,
        strategy="fedavg",
        cohort="all 6 of 6 clients per round",
        engine="serial",
        framework="numpy",
        seed=1,
        rounds=NUM_ROUNDS,
        folder=folder,
        config=config,
        layout=trainer.layout,
    )


def _end(callback: Callback, run: RunInfo, rounds: Sequence[Round], status: str, reason: str) -> None:
    history = [history_entry(round) for round in rounds]
    summary = summarise(run, history, status=status, reason=reason, parameters_sha256="00")
    _call(callback, "on_end", f"with status {status} after {len(rounds)} rounds", summary)
    _call(callback, "close", "after the end")
    _call(callback, "close", "a second time")


def _call(callback: Callback, method: str, where: str, *arguments: Any) -> str | None:
    """Call a method as in a run, and check that it changes neither its argument nor the process."""
    guarded = [_guard(argument) for argument in arguments]
    before, process = _fingerprint(guarded), _process_state()
    try:
        with time_limit(CLOSE_TIMEOUT_S):
            result = getattr(callback, method)(*guarded)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{method} must not fail {where}: {type(error).__name__}: {error}") from error
    assert _fingerprint(guarded) == before, f"{method} must not change its argument {where}"
    for name, value in _process_state().items():
        assert value == process.get(name, value), f"{method} must not change {name} {where}"
    if method not in ("on_start", "on_round"):
        return None
    is_reason = result is None or (isinstance(result, str) and bool(result.strip()))
    assert is_reason, f"{method} must return None or the reason to end the run as text, not {result!r}"
    return result


def _guard(argument: Any) -> Any:
    if isinstance(argument, Round):
        return read_only_round(argument)
    return read_only_run(argument) if isinstance(argument, RunInfo) else deepcopy(argument)


def _fingerprint(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return tuple((key, _fingerprint(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_fingerprint, value))
    if is_dataclass(value):
        return tuple(_fingerprint(getattr(value, field.name)) for field in fields(value))
    return repr(value)


def _process_state() -> dict[str, Any]:
    """Return the parts of the process state that a callback must not change, by name."""
    state: dict[str, Any] = {
        "the random state of Python": random.getstate(),
        "the global random state of NumPy": _fingerprint(np.random.get_state()),  # noqa: NPY002
        "the working directory": os.getcwd(),
        "the environment": dict(os.environ),
    }
    if "torch" in sys.modules:
        state["the global random state of torch"] = sys.modules["torch"].get_rng_state().numpy().tobytes()
    return state


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Redirect the standard streams of Python and of the operating system, as on a cluster."""
    with ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR)
        stack.callback(os.close, null)
        for number in (0, 1, 2):
            saved = os.dup(number)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, number)
            os.dup2(null, number)
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(redirect_stderr(StringIO()))
        yield
