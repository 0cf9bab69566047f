"""Find tasks and metrics of the user by name. Code is imported only from modules that the person allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedlearn.core.metric import Metric
from fedlearn.core.tasks import TASKS, Task, as_task
from fedlearn.errors import SettingError, did_you_mean, require
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.builders import find_target


def find_task(name: str, allow: Sequence[str]) -> Task:
    """Return the shipped task with a name, or the task of the user with an import path.

    Args:
        name: name in a file or a message, which may come from another person.
        allow: modules of the user that may be imported.

    Raises:
        SettingError: the name is unknown, its module is not allowed, or the object is no `Task`.
    """
    if not isinstance(name, str) or name in TASKS or "." not in name:
        return as_task(name)
    expected = "a shipped task, or a task in an allowed module"
    task: Task = _find(name, "task", allow, Task, expected)
    fix = f'Task(name="{name}", ...)'
    require(task.name == name, f"the name of task {name}", task.name, "its import path", fix)
    return task


def find_metrics(paths: Sequence[Any], allow: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics with these import paths.

    Args:
        paths: import paths, e.g. ``my_code.ece``.
        allow: modules of the user that may be imported.

    Raises:
        SettingError: a module is not allowed, or an object is no `Metric`.
    """
    return tuple(
        path if isinstance(path, Metric) else _find(path, "metrics", allow, Metric, "metrics in allowed modules")
        for path in paths
    )


def add_metrics(scenario: Scenario, paths: Sequence[Any], main: str | None, *, allow: Sequence[str]) -> Scenario:
    """Return a scenario with metrics of the user and another main metric.

    Args:
        scenario: scenario.
        paths: import paths of metrics, or `Metric` objects of a Python program.
        main: main metric; None keeps the main metric of the scenario.
        allow: modules of the user that may be imported.

    Raises:
        SettingError: a metric cannot be found, its name is taken, or the main metric is unknown.
    """
    is_list = isinstance(paths, list | tuple)
    require(is_list, "metrics", paths, "a list of import paths", "'metrics=[my_code.ece]'")
    data = replace(scenario.data, metrics=(*scenario.data.metrics, *find_metrics(paths, allow)))
    known, chosen = data.task.metric_names, main or scenario.metric
    near = did_you_mean(str(chosen), known) or data.task.main_metric
    is_known = chosen is None or chosen in known
    require(is_known, "metric", chosen, f"one of {', '.join(known)}", f"metric={near}")
    return replace(scenario, data=data, metric=chosen)


def _find(path: Any, setting: str, allow: Sequence[str], kind: type[Any], expected: str) -> Any:
    def is_allowed(place: str) -> bool:
        return any(place == module or place.startswith(f"{module}.") for module in allow)

    is_path = isinstance(path, str) and "." in path and all(part.isidentifier() for part in path.split("."))
    require(is_path, setting, path, "the import path of an object", f"{setting}=my_code.mine")
    module = path.partition(".")[0]
    fix = f"'allow_targets=[{module}]'   (if you trust this module)"
    require(is_allowed(path), setting, path, expected, fix)
    found = find_target(path, setting)
    if not isinstance(found, kind):
        shown = f"{path}, a {type(found).__name__}"
        raise SettingError(setting, shown, f"an object of fedlearn.{kind.__name__}", f"{setting}={module}.mine")
    return found
