"""Describe a task: targets, outputs, loss, metrics and predictions of a model.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlearn.core.metric import Metric
from fedlearn.errors import require

Loss = Callable[[Any, Any], Any]  # (outputs_BC, y_B) -> loss_B, in arrays of a framework
TASK_NAME = re.compile(r"(?=.{1,200}\Z)\w+(\.\w+)*", re.ASCII)


def single_output(num_classes: int) -> int:
    """Return 1, for a task whose model has one output."""
    return 1


def output_per_class(num_classes: int) -> int:
    """Return the number of classes, for a task whose model has one output per class."""
    return num_classes


def real_targets(y: np.ndarray) -> np.ndarray:
    """Return targets as float32. The values are not checked."""
    return np.asarray(y, np.float32)


def first_axes(y: np.ndarray) -> np.ndarray:
    """Return 1-D targets themselves, and zeros for targets with more axes."""
    return y if y.ndim == 1 else np.zeros(len(y), np.int64)


def num_columns(y: np.ndarray) -> int:
    """Return 1, or the number of columns of targets ``(N, C)``."""
    return 1 if y.ndim == 1 else int(y.shape[1])


@dataclass(frozen=True, kw_only=True, repr=False)
class Task:
    """Describe a kind of prediction. A shipped task has a name; a task of the user is an object in the user's module.

    Args:
        name: name of a shipped task, or the import path of this object, e.g. ``my_code.forecast``. Messages and files
            have this name. A short name without a module works within one Python program only.
        metrics: metrics in the order of tables. One of them is named ``loss``; it is computed with NumPy.
        main_metric: metric of tables and figures.
        loss: ``(outputs_BC, y_B) -> loss_B`` in arrays of the framework, one value per example; or a mapping from
            ``torch`` and ``jax`` to such functions. Shipped tasks have their losses in the trainers.
        targets: function that checks targets, ``(N, ...)``, and returns them in the dtype for training. It raises
            `DataError` for values that do not fit. Default: any real numbers.
        count_classes: function from targets to the number of classes, labels or values, which `FederatedData` keeps.
            Default: the number of columns of the targets.
        num_outputs: function from this number to the number of outputs of a model; default one output.
        strata: function from targets to one number per example, by which a split is stratified; default the targets.
        has_classes: True if targets are class numbers; -1 is padding.
        is_classification: True if each example has one class. A confusion matrix and class names then exist.
        positions_are_examples: True if each position of a sequence of targets counts as an example.
        averages_lists: True if the held-out part of a client is one list. Pooled values of metrics that need all
            outputs are then means over the lists.
        couples_examples: True if the loss of an example depends on the other examples of its batch. DP-SGD is then
            refused.
        probabilities: function from outputs to probabilities of the classes or labels; None if there are none.
        decide: ``(outputs, threshold) -> class numbers``; None for predictions that are values.
        class_axis: axis of the outputs with one entry per class; default the last axis.
        has_threshold: True if a threshold of the probability decides for a class or a label.
        example: function from the number of classes to outputs and targets of one example with valid values. None: the
            outputs have the shape ``(1, C)``, and the targets ``(1,)`` or ``(1, C)``.
        num_added: number of metrics at the end of ``metrics`` that are not part of the task; see `with_metrics`.

    Raises:
        SettingError: a name is not valid, or no metric is named ``loss``.
    """

    name: str
    metrics: tuple[Metric, ...]
    main_metric: str
    loss: Loss | Mapping[str, Loss] | None = None
    targets: Callable[[np.ndarray], np.ndarray] = real_targets
    count_classes: Callable[[np.ndarray], int] = num_columns
    num_outputs: Callable[[int], int] = single_output
    strata: Callable[[np.ndarray], np.ndarray] = first_axes
    has_classes: bool = False
    is_classification: bool = False
    positions_are_examples: bool = False
    averages_lists: bool = False
    couples_examples: bool = False
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None
    decide: Callable[[np.ndarray, float], np.ndarray] | None = None
    class_axis: int = -1
    has_threshold: bool = False
    example: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    num_added: int = 0

    def __post_init__(self) -> None:
        is_name = isinstance(self.name, str) and TASK_NAME.fullmatch(self.name) is not None
        fix = 'Task(name="my_code.forecast", ...)'
        require(is_name, "task.name", self.name, "the import path of the task", fix)
        names, setting = self.metric_names, f"metrics of task {self.name}"
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, setting, f"{twice}, twice", "different names", 'Metric(name="my_metric", ...)')
        expected = "a metric with the name loss, and the main metric"
        is_complete = "loss" in names and self.main_metric in names
        require(is_complete, setting, ", ".join(names), expected, 'mean_metric("loss", values, higher_is_better=False)')

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Task(name={self.name!r})"

    @property
    def has_class_names(self) -> bool:
        """True if a prediction is the name of a class, for each example or for each position of a sequence."""
        return self.has_classes and self.decide is not None and self.class_axis == -1

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, in their order."""
        return tuple(metric.name for metric in self.metrics)

    @property
    def lower_is_better(self) -> tuple[str, ...]:
        """Names of the metrics whose low values are good."""
        return tuple(metric.name for metric in self.metrics if not metric.higher_is_better)

    @property
    def unit_metrics(self) -> tuple[str, ...]:
        """Names of the metrics in the unit of the target."""
        return tuple(metric.name for metric in self.metrics if metric.in_target_unit)

    def with_metrics(self, metrics: Sequence[Metric]) -> Task:
        """Return this task with further metrics. A metric that the task already has is not added again.

        Raises:
            SettingError: an entry is not a `Metric`, or its name is taken.
        """
        for metric in metrics:
            expected, fix = "objects of fedlearn.Metric", "'metrics=[my_code.ece]'"
            require(isinstance(metric, Metric), "metrics", metric, expected, fix)
        new = tuple(metric for metric in metrics if metric not in self.metrics)
        if not new:
            return self
        for metric in new:
            fix = f'Metric(name="my_{metric.name}", ...)'
            is_free = metric.name not in self.metric_names
            require(is_free, "metrics", metric.name, f"another name than the metrics of task {self.name}", fix)
        return replace(self, metrics=(*self.metrics, *new), num_added=self.num_added + len(new))

    def example_arrays(self, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs and targets of one example, all zeros, from which the shapes of metric sums follow."""
        if self.example is not None:
            return self.example(num_classes)
        has_one_value = self.has_classes or self.num_outputs(num_classes) == 1
        shape = (1,) if has_one_value else (1, num_classes)
        return np.zeros((1, self.num_outputs(num_classes))), np.zeros(shape, np.int64 if self.has_classes else float)

    def metric(self, name: str) -> Metric:
        """Return the metric with this name.

        Raises:
            KeyError: the task has no such metric.
        """
        return next(metric for metric in self.metrics if metric.name == name)

    def loss_for(self, framework: str) -> Loss:
        """Return the loss of the user in a framework.

        Raises:
            SettingError: the task has no loss for this framework.
        """
        loss = self.loss.get(framework) if isinstance(self.loss, Mapping) else self.loss
        fix = f'Task(name="{self.name}", loss={{"{framework}": my_loss}}, ...)'
        if loss is None:
            require(False, f"loss of task {self.name}", "none", f"a loss for framework={framework}", fix)
        assert loss is not None
        return loss
