"""Judge the final model of a run once, on the held-out examples, and write ``evaluation.json``.

The result depends on the settings, the seed and the final parameters only. A resumed run therefore has the same file.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.callbacks.evaluation_file import EVALUATION_FILE, FORMAT
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.intervals import bootstrap_of
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ServerState
from fedlearn.core.tasks import Task
from fedlearn.data.preprocessing import Target
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.evaluation.classification import classification_entries, constant_class, entries_from_counts
from fedlearn.runner.evaluation.held_out import HeldOut, NotEvaluated, predict_held_out
from fedlearn.runner.evaluation.importance import importance_entries
from fedlearn.runner.evaluation.regression import regression_entries
from fedlearn.runner.evaluation.scores import MAX_CLASSES, estimates
from fedlearn.runner.evaluation.subgroups import subgroup_entries
from fedlearn.runner.evaluation.task_scores import scores_of
from fedlearn.runner.experiment import Experiment

MAX_EXAMPLES = 100_000  # with more, the bootstrap takes seconds, and its intervals are narrow
MAX_SITES = 100

log = logging.getLogger(__name__)


def write_evaluation(
    folder: Path, experiment: Experiment, state: ServerState, *, confusion_CC: np.ndarray | None = None
) -> None:
    """Judge the final model and write ``evaluation.json``. An error is logged and does not end the run.

    Args:
        folder: run folder.
        experiment: data and trainer.
        state: server state with the final model.
        confusion_CC: counts of the last evaluation, which are all that nodes send; None if unknown.
    """
    try:
        evaluation = evaluate_final_model(experiment, state, confusion_CC=confusion_CC)
        write_atomically(folder / EVALUATION_FILE, json.dumps(evaluation, allow_nan=False, ensure_ascii=False) + "\n")
    except Exception as error:
        log.exception("the final model cannot be judged")
        sys.stderr.write(f" no {EVALUATION_FILE}: {type(error).__name__}: {error}\n")


def evaluate_final_model(
    experiment: Experiment, state: ServerState, *, confusion_CC: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the content of ``evaluation.json``, see `fedlearn.callbacks.evaluation_file`."""
    head = {"format": FORMAT, "round": state.round}
    try:
        held_out = predict_held_out(experiment, state)
    except NotEvaluated as reason:
        is_deployed = experiment.scenario.data.num_train is not None
        return {**head, "missing": str(reason), **(_at_nodes(experiment, confusion_CC) if is_deployed else {})}
    target, task = target_of(experiment.scenario), experiment.scenario.data.task
    scores = scores_of(held_out, task, target)
    rng = generator(experiment.plan.seed, Purpose.INTERVALS)
    is_small = len(held_out.targets_N) <= MAX_EXAMPLES
    bootstrap = bootstrap_of(held_out.client_N, held_out.unit_N) if is_small else None
    too_large = f"no intervals: more than {MAX_EXAMPLES:,} held-out examples make them narrow"
    return {
        **head,
        "model": "models of the clients" if experiment.plan.strategy.local.personal_parameters else "global model",
        "examples": held_out.source,
        "num_examples": len(held_out.targets_N),
        "sites": _sites(held_out, experiment.scenario, target),
        "metrics": estimates(scores, bootstrap, rng),
        "intervals": bootstrap.method if bootstrap else too_large,
        **_task_entries(held_out, task, target),
        **_by_columns(experiment, held_out),
    }


def target_of(scenario: Scenario) -> Target:
    """Return the target of a scenario; without preprocessing, the classes are their numbers."""
    if scenario.preprocessing is not None:
        return scenario.preprocessing.target
    task, num_classes = scenario.data.task, scenario.data.num_classes
    return Target(task=task, classes=tuple(map(str, range(num_classes))) if task.decide else ())


def _task_entries(held_out: HeldOut, task: Task, target: Target) -> dict[str, Any]:
    """Return the entries of a classification or of a regression; none for other tasks."""
    if task.is_classification:
        return {"constant": constant_prediction(held_out, target), **classification_entries(held_out, target)}
    if task.name == "regression":
        return {"constant": constant_prediction(held_out, target), **regression_entries(held_out, target)}
    return {"constant": {"prediction": "random order", "metrics": {"c_index": 0.5}}} if task.name == "survival" else {}


def constant_prediction(held_out: HeldOut, target: Target) -> dict[str, Any]:
    """Return the metrics of the best constant prediction: the largest class, or the mean of the targets."""
    if target.task.is_classification:
        count_C = np.bincount(held_out.targets_N.astype(np.int64), minlength=len(target.classes))
        return constant_class(count_C, target.classes)
    truth_N = target.centre + target.spread * np.asarray(held_out.targets_N, np.float64)
    values = {"rmse": float(truth_N.std()), "mae": float(abs(truth_N - truth_N.mean()).mean()), "r2": 0.0}
    return {"prediction": "the mean of the targets", "metrics": values}


def _at_nodes(experiment: Experiment, confusion_CC: np.ndarray | None) -> dict[str, Any]:
    """Return the entries that follow from numbers of examples and from the counts that nodes send."""
    data, guarantee = experiment.scenario.data, experiment.plan.strategy.privacy_guarantee
    withheld = guarantee is not None and "examples" in guarantee.withheld
    sizes = {} if withheld or data.num_train is None else data.num_train
    sites = [
        {"client": int(client), "name": data.name(client), "num_train": int(count)}
        for client, count in list(sizes.items())[:MAX_SITES]
    ]
    if confusion_CC is None or len(confusion_CC) > MAX_CLASSES:
        return {"sites": sites}
    return {"sites": sites, **entries_from_counts(confusion_CC, target_of(experiment.scenario))}


def _sites(held_out: HeldOut, scenario: Scenario, target: Target) -> list[dict[str, Any]]:
    """Return number of held-out examples, and of positive examples, of the first clients."""
    sites = []
    for number, client in enumerate(held_out.clients[:MAX_SITES]):
        target_N = held_out.targets_N[held_out.client_N == number]
        is_binary = target.task.is_classification and len(target.classes) == 2
        positives = {"num_positive": int((target_N == 1).sum())} if is_binary else {}
        name = scenario.data.name(client)
        sites.append({"client": int(client), "name": name, "num_examples": len(target_N), **positives})
    return sites


def _by_columns(experiment: Experiment, held_out: HeldOut) -> dict[str, Any]:
    """Return the entries ``importance`` and ``subgroups``, which need inputs that are columns of a table."""
    scenario, plan = experiment.scenario, experiment.plan
    metric = scenario.metric or scenario.data.task.main_metric
    rng = generator(plan.seed, Purpose.PERMUTATION)
    if held_out.are_sequences:
        return {"importance": {"missing": "the inputs are sequences"}, "subgroups": []}
    importance = importance_entries(held_out, scenario.preprocessing, scenario.data.task, metric, rng)
    names: Sequence[str] = plan.subgroups if held_out.clients or scenario.held_out_columns is None else ()
    rng = generator(plan.seed, Purpose.INTERVALS, round=1)
    return {"importance": importance, "subgroups": subgroup_entries(held_out, scenario, names, metric, rng)}
