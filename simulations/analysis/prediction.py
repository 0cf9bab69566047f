"""Predict new examples with a trained model.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np

from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE
from fedlearn.core.federated_data import Task
from fedlearn.data.folder import list_images
from fedlearn.errors import DataError
from fedlearn.runner.trained_model import TrainedModel, load_trained_model


def predict(folder: Path, data: Path, *, checkpoint: str = "last") -> tuple[list[str], np.ndarray]:
    """Return column names and a row for each example. Print the round of the model to standard error.

    Args:
        folder: folder of the run.
        checkpoint: ``last`` (default), ``best`` or the number of a round.
        data: file in the format of the scenario, or folder of images. Inputs of the model are also accepted, one row
            per example: a ``.npy`` file, a ``.npz`` file with an array ``x``, or a ``.csv`` file of numbers.

    Returns:
        Columns for a binary task: ``prediction``, ``probability`` (of class 1). For more classes: ``prediction`` and
        the probability of each class. For regression: ``prediction``.

    Raises:
        FedlearnError: There is no model, or the file does not have inputs of the model.
    """
    model = load_trained_model(folder, checkpoint=checkpoint)
    sys.stderr.write(f"{model.description}\n")
    outputs_NC = model.scenario.trainer.predict(model.params_D, _inputs(model, data))
    names, rows = prediction_columns(outputs_NC, model.scenario.data.task)
    if model.scenario.data.task == "regression":
        centre, spread = model.scenario.target_scale
        rows = centre + spread * rows
    return names, rows


def write_predictions(folder: Path, data: Path, *, out: Path | None = None, checkpoint: str = "last") -> int:
    """Write one line of CSV for each example, and return the exit code.

    Args:
        folder: folder of the run.
        data: file or folder of examples, as in `predict`.
        out: path of the CSV file; None writes to standard output.
        checkpoint: checkpoint of the model, as in `predict`.

    Raises:
        FedlearnError: There is no model, or the file does not have inputs of the model.
    """
    names, rows = predict(folder, data, checkpoint=checkpoint)
    cells = [[f"{value:.6g}" for value in row] for row in rows]
    if data.is_dir():
        names = ["file", *names]
        cells = [[file.name, *row] for file, row in zip(list_images(data), cells, strict=True)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(cells)
    if out:
        write_atomically(out, text.getvalue())
    sys.stdout.write(f"{out}\n" if out else text.getvalue())
    return DONE


def prediction_columns(outputs_NC: np.ndarray, task: Task) -> tuple[list[str], np.ndarray]:
    """Return column names and predictions for raw outputs ``(N, C)`` of a model."""
    outputs_NC = np.asarray(outputs_NC, np.float64)
    if task == "regression":
        return ["prediction"], outputs_NC[:, :1]
    if task == "binary":
        probability_N = 1 / (1 + np.exp(-outputs_NC[:, 0]))
        return ["prediction", "probability"], np.stack([probability_N > 0.5, probability_N], axis=1)
    shifted_NC = np.exp(outputs_NC - outputs_NC.max(axis=1, keepdims=True))
    probability_NC = shifted_NC / shifted_NC.sum(axis=1, keepdims=True)
    names = ["prediction", *(f"probability_{label}" for label in range(outputs_NC.shape[1]))]
    return names, np.column_stack([probability_NC.argmax(axis=1), probability_NC])


def _inputs(model: TrainedModel, data: Path) -> np.ndarray:
    if not data.is_file() and not list_images(data):
        raise DataError(
            f"--data={data} is not a file\n  expected  a file of examples, or a folder of images\n"
            "  try       --data examples.npy"
        )
    if data.suffix not in (".npy", ".npz") and model.scenario.read_inputs is not None:
        return model.scenario.read_inputs(data)
    x = _read_array(data)
    shape = model.input_shape
    if x.shape[1:] != shape and x[0].size != int(np.prod(shape)):
        expected = " x ".join(map(str, shape))
        raise DataError(
            f"{data} has examples of shape {x.shape[1:]}\n  expected  {expected}, the input shape of the model\n"
            "  try       a file with examples of this shape"
        )
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))[0])
        raise DataError(
            f"{data} has a value that is missing or not finite in row {row + 1}\n  expected  finite numbers\n"
            f"  try       the file without row {row + 1}"
        )
    return x.reshape(len(x), *shape).astype(model.example.dtype)


def _read_array(data: Path) -> np.ndarray:
    try:
        if data.suffix == ".npy":
            array = np.load(data, allow_pickle=False)
        elif data.suffix == ".npz":
            with np.load(data, allow_pickle=False) as arrays:
                array = arrays["x"]
        else:
            array = _read_numbers(data)
    except (OSError, KeyError, ValueError) as error:
        expected = "a .npy file, a .npz file with an array x, or a .csv file of numbers"
        problem = f"{data} cannot be read: {error}"
        raise DataError(f"{problem}\n  expected  {expected}\n  try       --data examples.npy") from error
    if array.ndim < 2 or not len(array):
        raise DataError(
            f"{data} has shape {array.shape}\n  expected  a row for each example, and at least one row\n"
            "  try       an array of shape (examples, features)"
        )
    return np.asarray(array)


def _read_numbers(data: Path) -> np.ndarray:
    with data.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and not all(_is_number(cell) for cell in rows[0]):
        del rows[0]  # column names
    return np.array([[float(cell) for cell in row] for row in rows])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
