"""Describe everything between raw examples, model inputs, model outputs and predictions, without the training data.

A run writes this description as ``model/preprocessing.json``. The same object transforms the training data, so training
and prediction cannot differ. The file holds constants only and names no code.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from fedlearn.core.serialization import WireError, parse_json_object
from fedlearn.core.tasks import Task, TaskField
from fedlearn.core.tasks.base import single_output
from fedlearn.data.cell_formats import DateFormat, NumberFormat, TextFormat
from fedlearn.data.column_types import Category, HashedText, Number
from fedlearn.data.inputs import (
    ArrayInputs,
    CharacterInputs,
    ImageInputs,
    Inputs,
    TableInputs,
    TextColumnInputs,
    TextInputs,
)
from fedlearn.data.prompt_inputs import PromptInputs
from fedlearn.data.subword_tokenizer import SubwordTokenizer
from fedlearn.data.text_tokenizers import CharacterEncoding, HashingTokenizer
from fedlearn.data.token_inputs import SubwordTokenInputs, TokenInputs
from fedlearn.errors import DataError, is_number

FORMAT = 1
MAX_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Target:
    """Describe the target, and turn model outputs into predictions.

    Args:
        name: name of the target.
        task: a task, or the name of a shipped task. The attribute is a `Task`.
        classes: names of the classes or labels in the order of their numbers; for ``binary`` the second is the positive
            class. Empty for tasks whose predictions are values.
        centre: target value at which the model output is 0, for ``regression``.
        spread: change of the target that changes the model output by 1, for ``regression``; not 0.
        unit: unit of a regression target, e.g. ``days``; may be empty.
    """

    name: str = "target"
    task: TaskField = TaskField()  # noqa: RUF009 - a descriptor, without a default
    classes: tuple[str, ...] = ()
    centre: float = 0.0
    spread: float = 1.0
    unit: str = ""

    def __post_init__(self) -> None:
        task = self.task
        are_texts = isinstance(self.classes, tuple) and all(isinstance(name, str) for name in self.classes)
        are_unique = are_texts and len(set(self.classes)) == len(self.classes) <= MAX_CLASSES
        is_count_right = len(self.classes) == 2 if task.name == "binary" else bool(self.classes) == bool(task.decide)
        is_scale = all(is_number(value) and math.isfinite(value) for value in (self.centre, self.spread))
        is_text = isinstance(self.name, str) and isinstance(self.unit, str)
        if not (are_unique and is_count_right and is_scale and self.spread and is_text):
            raise ValueError("a wrong target")

    @property
    def positive_class(self) -> str | None:
        """Name of the class with number 1 of a binary task; None for other tasks."""
        return self.classes[1] if self.task.name == "binary" else None

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes or labels, float64, for a task that has probabilities.

        Their shape is ``(N, C)`` for one class or some labels per example; see `Task.class_axis` for others.
        """
        assert self.task.probabilities is not None
        return self.task.probabilities(np.asarray(outputs, np.float64))

    def values(self, outputs_NC: np.ndarray) -> np.ndarray:
        """Return the values float64 in the unit of the target, or scores: ``(N,)``, or ``(N, C)`` for C > 1."""
        values_NC = self.centre + self.spread * np.asarray(outputs_NC, np.float64)
        has_one_value = self.task.num_outputs is single_output or values_NC.shape[1] == 1
        return values_NC[:, 0] if has_one_value else values_NC

    def class_numbers(self, outputs: np.ndarray, threshold: float = 0.5) -> np.ndarray:
        """Return the number of the predicted class of each example, ``(N,)``, or of each position.

        Args:
            outputs: model outputs.
            threshold: probability above which a binary task predicts the positive class, in [0, 1).
        """
        assert self.task.decide is not None
        return self.task.decide(np.asarray(outputs, np.float64), threshold)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Hold the inputs and the target of a scenario.

    Args:
        inputs: turns raw examples into model inputs.
        target: turns model outputs into predictions.

    >>> target = Target(task="binary", classes=("no", "yes"))
    >>> preprocessing = Preprocessing(inputs=TableInputs(columns=(Number(name="age", fill=0.0),)), target=target)
    >>> Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    True
    """

    inputs: Inputs
    target: Target

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Inputs) or not isinstance(self.target, Target):
            raise ValueError("wrong inputs or a wrong target")

    def to_json(self) -> str:
        """Return the description as JSON, for `from_json`."""
        content = {"format": FORMAT, "inputs": _to_json(self.inputs), "target": _to_json(self.target)}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "preprocessing.json", task: Task | None = None) -> Preprocessing:
        """Return the description in a text that `to_json` returned. Nothing in the text is executed.

        Args:
            text: untrusted text.
            source: name of the file, for messages.
            task: task of the user that the text may name; None for shipped tasks only.

        Raises:
            DataError: the text is damaged, or another version of fedlearn wrote it.
        """
        try:
            content = parse_json_object(text)
            if content.get("format") != FORMAT:
                raise ValueError(f"format {content.get('format')!r}, expected {FORMAT}")
            target = dict(content["target"])
            if task is not None and target["task"] == task.name:
                target["task"] = task
            return cls(inputs=_from_json(content["inputs"]), target=_from_json(target, Target))
        except (WireError, ValueError, KeyError, TypeError, RecursionError) as error:
            fix = "the file of the run, and the version of fedlearn that wrote it"
            problem = f"{source} cannot be read: {str(error).splitlines()[0][:200] if str(error) else 'wrong content'}"
            raise DataError(f"{problem}\n  advice    {fix}") from error

    @property
    def digest(self) -> str:
        """SHA-256 digest of the description."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


_KINDS: Mapping[str, type[Any]] = {
    "number": Number,
    "category": Category,
    "hashed text": HashedText,
    **{kind.kind: kind for kind in (NumberFormat, DateFormat, TextFormat)},
    "character encoding": CharacterEncoding,
    **{
        kind.kind: kind
        for kind in (
            TableInputs,
            ImageInputs,
            TextInputs,
            TextColumnInputs,
            TokenInputs,
            SubwordTokenInputs,
            CharacterInputs,
            ArrayInputs,
            PromptInputs,
        )
    },
    **{kind.kind: kind for kind in (HashingTokenizer, SubwordTokenizer)},
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, Task):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": _NAMES[type(value)]} if type(value) in _NAMES else {}
        return kind | {field.name: _to_json(getattr(value, field.name)) for field in fields(value)}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _from_json(value: Any, cls: type[Any] | None = None) -> Any:
    """Return the record of a mapping, which has exactly the fields of its class. The class checks their values."""
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    content = dict(value)
    if cls is None:
        kind = content.pop("kind", None)
        if kind not in _KINDS:
            raise ValueError(f"unknown kind {str(kind)[:60]!r}")
        cls = _KINDS[kind]
    if set(content) != {field.name for field in fields(cls)}:
        raise ValueError(f"wrong fields of {cls.__name__}")
    return cls(**{name: _from_json(item) for name, item in content.items()})
