"""Read the targets of a task from one or more columns of a table.

Shapes: N rows, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlearn.core.tasks import TASKS, Task, as_task
from fedlearn.data.column_types import numeric_column
from fedlearn.data.encoding import encode_targets
from fedlearn.data.levels import to_categories, to_category
from fedlearn.data.tables import Table
from fedlearn.errors import SettingError, require

# cells of a column of two values, in lower case; other values need scenario.classes
NO = frozenset({"0", "false", "f", "no", "n", "alive", "living", "censored"})
YES = frozenset({"1", "true", "t", "yes", "y", "dead", "died", "death", "deceased", "event"})


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Hold the targets of all rows.

    Args:
        names: columns of the targets.
        y: targets, ``(N,)``, or one row of values per example.
        task: task of the model.
        classes: names of the classes or labels; empty for values.
    """

    names: tuple[str, ...]
    y: np.ndarray
    task: Task
    classes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name of the target: the names of its columns."""
        return ", ".join(self.names)


def read_targets(
    table: Table,
    target: str | Sequence[str],
    *,
    task: str | None,
    classes: Sequence[object] | None,
    has_all_clients: bool,
) -> Targets:
    """Return the targets of a table.

    Args:
        table: rows with the columns of targets.
        target: one column, or a list of columns: time and event for ``survival``, labels for ``multilabel``.
        task: task of the model; None infers it from one column.
        classes: all classes in the order of their numbers. For ``survival`` and ``multilabel`` they are the two values
            of an event or a label, first the value for no. None takes the classes in the table, or usual values such as
            0/1, false/true, no/yes and alive/dead.
        has_all_clients: whether the table holds the rows of all clients.

    Raises:
        DataError: a target is missing, or does not fit the task; the message names file and row.
        SettingError: a setting does not fit the task.
    """
    names = target_names(target)
    require_columns(names, task)
    if task == "survival":
        return Targets(names=names, y=_times_and_events(table, names, classes), task=TASKS[task])
    if task == "multilabel":
        y_NL = np.stack([_two_values(table, name, classes) for name in names], axis=1)
        return Targets(names=names, y=y_NL, task=TASKS[task], classes=names)
    y_N, kind, known = encode_targets(table, names[0], task=task, classes=classes, has_all_clients=has_all_clients)
    return Targets(names=names, y=y_N, task=as_task(kind), classes=known)


def declared_target(settings: Mapping[str, Any]) -> tuple[Task, tuple[str, ...]] | None:
    """Return the task, and the classes or labels, that settings alone determine; None if they do not.

    Args:
        settings: ``target``, ``task`` and ``classes`` of a scenario, as plain values.
    """
    task, names = settings.get("task"), tuple(map(to_category, settings.get("classes") or ()))
    if task in ("regression", "survival"):
        return as_task(task), ()
    if task == "multilabel":
        return TASKS[task], target_names(settings["target"])
    if not names:
        return None
    return as_task(task or ("binary" if len(names) == 2 else "multiclass")), names


def target_names(target: str | Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a target."""
    return (target,) if isinstance(target, str) else tuple(map(str, target))


def require_columns(names: Sequence[str], task: str | None) -> None:
    """Refuse a number of target columns that does not fit the task.

    Raises:
        SettingError: the number or the names do not fit.
    """
    shown = f"[{','.join(names)}]"
    if task == "survival":
        fix = f"'scenario.target=[{names[0] if names else 'time'},died]'"
        require(len(names) == 2, "target", shown, "two columns for task=survival: the time and the event", fix)
    elif task != "multilabel" and len(names) != 1:
        expected = "survival (time and event) or multilabel (one column per label), because there are several targets"
        require(False, "task", task, expected, "scenario.task=multilabel")
    is_valid = len(names) > 0 and len(set(names)) == len(names)
    require(is_valid, "target", shown, "different columns", "'scenario.target=[a,b,c]'")


def _times_and_events(table: Table, names: Sequence[str], classes: Sequence[object] | None) -> np.ndarray:
    time, event = names
    for name in names:
        table.column(name, "scenario.target")
    if classes is None and _are_two_values(table, time) and not _are_two_values(table, event):
        fix = f"'scenario.target=[{event},{time}]'"
        raise SettingError("target", f"[{time},{event}]", "first the time, then the event", fix)
    times_N = numeric_column(table, time)
    table.refuse(np.isnan(times_N), time, "missing, but it is the time of the target", "write the time in this cell")
    wrong_N = (times_N < 0) | ~np.isfinite(times_N)
    table.refuse(wrong_N, time, "a negative time, expected a number >= 0", "correct the time")
    return np.stack([times_N, _two_values(table, event, classes).astype(np.float64)], axis=1)


def _two_values(table: Table, name: str, classes: Sequence[object] | None) -> np.ndarray:
    """Return 1 for yes and 0 for no in a column of two values, int64."""
    cells_N = to_categories(table.column(name, "scenario.target"))
    missing_N = np.array([cell is None for cell in cells_N], bool)
    table.refuse(missing_N, name, "missing, but it is a target", "write the target in this cell")
    if classes is None:
        no, yes = NO, YES
        values_N = np.array([cell.strip().lower() for cell in cells_N], object)
    else:
        pair = tuple(map(to_category, classes))
        is_pair = len(pair) == 2 and pair[0] != pair[1]
        expected = "two values: first the value for no, then the value for yes"
        require(is_pair, "classes", list(classes), expected, "'scenario.classes=[censored,relapse]'")
        no, yes, values_N = frozenset(pair[:1]), frozenset(pair[1:]), cells_N
    unknown_N = np.array([value not in no and value not in yes for value in values_N], bool)
    expected = " or ".join([*pair]) if classes is not None else "0 or 1, false or true, no or yes"
    fix = "'scenario.classes=[NO,YES]', first the value for no, then the value for yes"
    table.refuse(unknown_N, name, f"neither of the values {expected}", fix)
    return np.array([value in yes for value in values_N], np.int64)


def _are_two_values(table: Table, name: str) -> bool:
    cells = [cell for cell in to_categories(table.columns[name]) if cell is not None]
    return all(cell.strip().lower() in NO | YES for cell in cells)
