"""Predict new examples with a trained model, and write the predictions as CSV.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from fedlearn.core.checkpoint import atomic_draft
from fedlearn.core.command_line import DONE
from fedlearn.data.example_files import InputBatch, id_columns
from fedlearn.errors import require
from fedlearn.runner.trained_model import BATCH_SIZE, TrainedModel, check_threshold, load_trained_model


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """Hold the options of predictions.

    Args:
        checkpoint: ``last``, ``best`` or the number of a round.
        client: client of a personal model; None for a run with one model.
        ids: columns of the examples to copy before the predictions.
        threshold: probability above which a binary task predicts the positive class, in [0, 1).
        batch_size: largest number of examples in memory, >= 1.
        allow_unknown: whether an unknown category counts as missing. If not, it is an error.
        allow_missing: whether an absent column counts as missing. If not, it is an error.
        base: folder or name of the pretrained model of the run; None takes ``model.path`` of the run.
    """

    checkpoint: str = "last"
    client: str | None = None
    ids: tuple[str, ...] = ()
    threshold: float = 0.5
    batch_size: int = BATCH_SIZE
    allow_unknown: bool = False
    allow_missing: bool = False
    base: str | None = None


def write_predictions(
    folder: Path, data: Path, *, out: Path | None = None, options: PredictionOptions = PredictionOptions()
) -> int:
    """Write one line of CSV for each example, batch by batch, and return the exit code.

    The columns are ``file`` for images, the ids, ``prediction`` and for a classification the probability of each class.
    Sentences have one line for each token, with the columns ``line``, ``token`` and ``prediction``. The round of the
    model goes to standard error.

    Args:
        folder: run folder.
        data: file of examples or folder of images, see `fedlearn.data.example_files.read_batches`.
        out: path of the CSV file; None writes to standard output.
        options: options of the predictions.

    Raises:
        FedlearnError: there is no model, or an example is not valid. A file ``out`` then keeps its content.
    """
    model = load_trained_model(folder, checkpoint=options.checkpoint, client=options.client, base=options.base)
    check_threshold(model.target, options.threshold)
    sys.stderr.write(f"{model}\n")
    with _output(out) as file:
        writer = csv.writer(file, lineterminator="\n")
        batches = model.batches(
            data,
            batch_size=options.batch_size,
            allow_unknown=options.allow_unknown,
            allow_missing=options.allow_missing,
        )
        for number, batch in enumerate(batches):
            head, rows = _lines(model, batch, options)
            if number == 0:
                writer.writerow(head)
            writer.writerows(rows)
    if out:
        sys.stdout.write(f"{out}\n")
    return DONE


@contextmanager
def _output(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    with atomic_draft(out) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        yield file


def _lines(model: TrainedModel, batch: InputBatch, options: PredictionOptions) -> tuple[list[str], list[Sequence[str]]]:
    """Return the names of the columns, and the cells of each example."""
    if batch.sentences:
        return _token_lines(model, batch, options)
    outputs_NC = model.trainer.predict(model.params_D, batch.x)
    columns: dict[str, Sequence[str]] = {"file": batch.files} if batch.files else {}
    has_columns = batch.table is not None or not options.ids
    require(has_columns, "--id", ", ".join(options.ids), "no column, because this file has none", "remove --id")
    if batch.table is not None:
        columns |= id_columns(batch.table, options.ids)
    columns |= prediction_columns(model, outputs_NC, options.threshold)
    return list(columns), list(zip(*columns.values(), strict=True))


def _token_lines(
    model: TrainedModel, batch: InputBatch, options: PredictionOptions
) -> tuple[list[str], list[Sequence[str]]]:
    """Return the line, the token and the predicted tag of each token."""
    require(not options.ids, "--id", ", ".join(options.ids), "no column, because each token is copied", "remove --id")
    rows = [
        (str(sentence.line_of(position)), token, tag)
        for sentence, tags in zip(batch.sentences, model.tags(batch), strict=True)
        for position, (token, tag) in enumerate(zip(sentence.tokens, tags, strict=True))
    ]
    return ["line", "token", "prediction"], [*rows]


def prediction_columns(model: TrainedModel, outputs_NC: np.ndarray, threshold: float = 0.5) -> dict[str, list[str]]:
    """Return the columns of predictions as text, for the outputs of a model.

    Args:
        model: trained model.
        outputs_NC: its outputs.
        threshold: see `PredictionOptions`.
    """
    labels, task = model.labels(outputs_NC, threshold), model.target.task
    if task.decide is None:
        return _value_columns(labels)
    if task.class_axis == 1:  # an image of classes
        share_CN = [(labels == number).reshape(len(labels), -1).mean(axis=1) for number in range(len(model.classes))]
        names = [f"share_{name}" for name in model.classes]
        return {name: [f"{value:.6g}" for value in column_N] for name, column_N in zip(names, share_CN, strict=True)}
    if task.has_class_names and labels.ndim > 1:  # one class per token
        return {"prediction": [" ".join(map(str, row)) for row in labels]}
    if task.is_classification:
        predictions = [str(label) for label in labels]
    else:  # some labels of each example
        predictions = ["; ".join(np.array(model.classes)[row == 1]) for row in labels]
    columns = {"prediction": predictions}
    for name, column_N in zip(model.classes, model.target.probabilities(outputs_NC).T, strict=True):
        columns[f"probability_{name}"] = [f"{value:.6g}" for value in column_N]
    return columns


def _value_columns(values: np.ndarray) -> dict[str, list[str]]:
    if values.ndim == 1:
        return {"prediction": [f"{value:.6g}" for value in values]}
    rows = values.reshape(len(values), -1).T
    return {f"prediction_{number}": [f"{value:.6g}" for value in row] for number, row in enumerate(rows, start=1)}
