"""Ship the tasks of the library. A task of the user is another object of `Task`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedlearn.core.tasks.base import Loss, Task
from fedlearn.core.tasks.classification import BINARY, MULTICLASS
from fedlearn.core.tasks.dense import SEGMENTATION, TOKEN_CLASSIFICATION
from fedlearn.core.tasks.language import CAUSAL_LM
from fedlearn.core.tasks.multilabel import MULTILABEL
from fedlearn.core.tasks.ranking import RANKING
from fedlearn.core.tasks.regression import REGRESSION
from fedlearn.core.tasks.survival import SURVIVAL
from fedlearn.errors import SettingError, did_you_mean

__all__ = ["TASKS", "Loss", "Task", "TaskField", "as_task"]

_SHIPPED = (
    BINARY,
    MULTICLASS,
    REGRESSION,
    RANKING,
    MULTILABEL,
    SURVIVAL,
    SEGMENTATION,
    TOKEN_CLASSIFICATION,
    CAUSAL_LM,
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _SHIPPED})


def as_task(task: Task | str) -> Task:
    """Return a task itself, or the shipped task with a name. Nothing is imported.

    Raises:
        SettingError: there is no shipped task with this name.

    >>> as_task("binary").main_metric
    'accuracy'
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    near = (did_you_mean(task, TASKS) if isinstance(task, str) else None) or "multiclass"
    shown = task if isinstance(task, str) else f"a {type(task).__name__}"
    raise SettingError("task", shown, f"one of {', '.join(TASKS)}, or a fedlearn.Task", f"task={near}")


class TaskField:
    """Declare a field of a frozen dataclass that accepts a task or the name of a shipped task, and holds the task."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, record: object, owner: type | None = None) -> Task:
        if record is None:  # the dataclass asks for a default value
            raise AttributeError(self._name)
        task: Task = vars(record)[self._name]
        return task

    def __set__(self, record: object, task: Task | str) -> None:
        vars(record)[self._name] = as_task(task)
