"""Describe a run without training: ``dry_run=true`` stops before the first round."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from omegaconf import DictConfig

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.callbacks.formatting import format_epsilon, header_lines, human_bytes, human_seconds
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, ClientWork, Request, ServerState, sorted_client_ids
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer
from fedlearn.runner.experiment import Experiment
from fedlearn.trainers.contract import list_names

MEASURED_STEPS = 3  # local steps that estimate the duration of training
MAX_ROUNDS_CHARGED = 10_000  # rounds of the predicted epsilon; each costs up to a millisecond


def is_dry_run(cfg: Mapping[str, Any] | DictConfig) -> bool:
    """Return the setting ``dry_run``; False if a configuration lacks it.

    Raises:
        SettingError: the value is neither true nor false.
    """
    value = cfg.get("dry_run", False)
    require(isinstance(value, bool), "dry_run", value, "true or false", "dry_run=true")
    return bool(value)


def refuse_dry_run(cfg: Mapping[str, Any] | DictConfig, command: str) -> None:
    """Refuse ``dry_run=true`` for a command that cannot stop before the first round.

    Args:
        cfg: all settings.
        command: name of the command, for the error.
    """
    expected = f"false for {command}; only simulations.run and deploy.submit have a dry run"
    require(not is_dry_run(cfg), "dry_run", "true", expected, "python -m simulations.run dry_run=true")


def print_dry_run(experiment: Experiment, info: RunInfo, state: ServerState) -> None:
    """Print the header of a run, its parameters, and the predicted epsilon, traffic and duration."""
    lines = [*header_lines(info), *_predictions(experiment, info, state)]
    sys.stdout.write("\n".join(f"{label:<10} {text}" for label, text in lines) + "\n")


def _predictions(experiment: Experiment, info: RunInfo, state: ServerState) -> Iterator[tuple[str, str]]:
    report, layout = experiment.model_report, experiment.scenario.trainer.layout
    sizes = {leaf.name: leaf.size for leaf in layout.trainable.leaves}
    parts = [f"{sum(sizes.values()):,} trainable in {len(sizes)} tensors"]
    parts += [f"frozen: {list_names(report.frozen)}"] if report.frozen else []
    parts += [f"without a gradient: {list_names(report.unused)}"] if report.unused else []
    yield "parameters", " · ".join(parts)
    if (epsilon := _final_epsilon(experiment, state)) is not None:
        yield "epsilon", f"at most {format_epsilon(epsilon)} after {info.rounds:,} rounds"
    updates = info.rounds * _mean_cohort_size(experiment, state)
    down, up = 4 * layout.num_parameters, info.bytes_per_update or 4 * layout.num_parameters
    size = human_bytes(updates * (down + up))
    yield "traffic", f"about {size} in {info.rounds:,} rounds, without data that a strategy sends in addition"
    if experiment.engine.in_process:
        seconds = updates * _seconds_per_client(experiment, state)
        yield "duration", f"about {human_seconds(seconds)} of training on one core, without evaluation"
    yield "dry run", "nothing was trained, and no run folder remains"


def _final_epsilon(experiment: Experiment, state: ServerState) -> float | None:
    """Return the epsilon after all rounds, without dropouts; None without a guarantee that has an epsilon."""
    strategy, rounds = experiment.plan.strategy, experiment.plan.schedule.rounds
    guarantee = strategy.privacy_guarantee
    if guarantee is None or guarantee.delta is None or rounds > MAX_ROUNDS_CHARGED:
        return None
    ledger = state.ledger
    for number in range(state.round + 1, rounds + 1):
        ledger = guarantee.charge(ledger, Release(round=number, clients=_cohort(experiment, state, number)))
    epsilon = guarantee.epsilon_of(ledger)
    return None if epsilon is None else epsilon.value


def _cohort(experiment: Experiment, state: ServerState, number: int) -> tuple[ClientId, ...]:
    """Return the cohort of a round. A selector that learns from earlier rounds can choose another cohort."""
    rng = generator(state.seed, Purpose.SELECT, round=number)
    chosen = experiment.plan.strategy.select.choose(number, experiment.engine.clients, rng, **state.select)
    return tuple(sorted_client_ids(chosen))


def _mean_cohort_size(experiment: Experiment, state: ServerState) -> float:
    """Return the mean size of the next cohorts, or the number of updates of a step of an asynchronous strategy."""
    rule, numbers = experiment.plan.strategy.asynchrony, range(state.round + 1, state.round + 4)
    if rule is not None:
        return rule.buffer_size
    return sum(len(_cohort(experiment, state, number)) for number in numbers) / len(numbers)


def _seconds_per_client(experiment: Experiment, state: ServerState) -> float:
    """Return the estimated duration of the local training of one client in a round."""
    data, local = experiment.scenario.data, experiment.plan.local
    client = next(client for client in data.clients if len(data.train(client)))
    examples = data.train(client)
    trainer: Trainer = experiment.scenario.trainer
    short = replace(local, epochs=1, steps=MEASURED_STEPS)
    request = Request(round=1, seed=state.seed, params_D=state.params_D, local=short)
    work = [ClientWork(client=client, examples=examples)]
    trainer.fit(request, plain_training, work)  # compiles the program
    start = time.perf_counter()
    trainer.fit(request, plain_training, work)
    seconds = time.perf_counter() - start
    return seconds / MEASURED_STEPS * ceil(local.num_steps(len(examples)))
