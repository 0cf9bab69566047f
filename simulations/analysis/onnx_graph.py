"""Add the preprocessing of a table, and the predictions, to the ONNX graph of a network.

A scaled number is computed in 64-bit arithmetic, as in training. ONNX cannot raise an error for a cell: an unknown
category counts as missing, and a number that is missing without a replacement gives NaN.

Shapes: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from fedlearn.data.column_types import Category, HashedText, Number
from fedlearn.data.inputs import Inputs, TableInputs
from fedlearn.data.preprocessing import Preprocessing, Target

ML_DOMAIN, ML_VERSION = "ai.onnx.ml", 3
BATCH = "batch"
PREDICTED_TASKS = ("binary", "multiclass", "regression")  # tasks with one prediction per example in the graph
PREFIX = "fedlearn_"  # prefix of added tensors


def add_preprocessing(path: Path, preprocessing: Preprocessing | None, metadata: Mapping[str, str]) -> None:
    """Change an ONNX file with the input ``x`` and the output ``outputs``.

    - A model of a table gets one input ``(N,)`` for each column, float64 for a number and string for a category. A
      table with hashed text keeps ``x``, because ONNX has no such hash.
    - A classification gets the outputs ``prediction`` (string), ``probabilities`` ``(N, C)``; a regression gets
      ``prediction`` in the unit of the target.

    Args:
        path: file to change.
        preprocessing: inputs and target of the model; None adds only the metadata.
        metadata: texts to store in the file.
    """
    model = onnx.load(path)
    table = preprocessing.inputs if preprocessing and _can_be_exported(preprocessing.inputs) else None
    if table is not None:  # a column may have the name of a tensor of the network
        model = compose.add_prefix(model, f"{PREFIX}network_")
    graph = _Graph(model)
    if isinstance(table, TableInputs):
        graph.add_table(table)
    if preprocessing is not None:
        graph.add_predictions(preprocessing.target)
    for name, text in metadata.items():
        model.metadata_props.add(key=name, value=text)
    graph.finish()
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _can_be_exported(inputs: Inputs) -> bool:
    return isinstance(inputs, TableInputs) and not any(isinstance(column, HashedText) for column in inputs.columns)


class _Graph:
    """Collect nodes before and after the nodes of a network."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        (network_input,), (self.network_output,) = model.graph.input, model.graph.output
        self.x, self.outputs = network_input.name, self.network_output.name
        self.num_axes = len(self.network_output.type.tensor_type.shape.dim)
        self.first: list[Any] = []
        self.last: list[Any] = []
        self._nodes = self.first
        self._count = 0

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the name of the output."""
        self._count += 1
        output = f"{PREFIX}{self._count}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], output, domain=domain, **attributes))
        return output

    def constant(self, value: Any, dtype: Any = np.float64) -> str:
        """Add a constant, and return its name."""
        self._count += 1
        name = f"{PREFIX}{self._count}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add_table(self, inputs: TableInputs) -> None:
        """Replace the input ``x`` by one input for each column."""
        kinds = {column.name: column for column in inputs.columns}
        del self.graph.input[:]
        for name, column in kinds.items():
            kind = TensorProto.STRING if isinstance(column, Category) else TensorProto.DOUBLE
            self.graph.input.append(helper.make_tensor_value_info(name, kind, [BATCH]))
        parts = [
            self._category(column) if isinstance(column, Category) else self._number(column)
            for column in inputs.columns
            if not isinstance(column, HashedText)
        ]
        joined = self.add("Concat", *parts, axis=1)
        shape = self.constant([-1, *inputs.input_shape], np.int64)
        self.first.append(helper.make_node("Reshape", [joined, shape], [self.x], f"{PREFIX}x"))
        dims = [dim.dim_value for dim in self.network_output.type.tensor_type.shape.dim]
        del self.graph.output[:]
        self._nodes = self.last
        self._output("outputs", TensorProto.FLOAT, [BATCH, *dims[1:]], self.outputs)

    def _output(self, name: str, kind: int, shape: list[Any], tensor: str) -> None:
        """Add an output with the value of a tensor. An input of the same name changes the name of the output."""
        while any(value.name == name for value in self.graph.input):
            name = f"model_{name}"
        self.last.append(helper.make_node("Identity", [tensor], [name], f"{PREFIX}{name}"))
        self.graph.output.append(helper.make_tensor_value_info(name, kind, shape))

    def _category(self, column: Category) -> str:
        cells = self.add("Unsqueeze", column.name, self.constant([1], np.int64))
        one_hot = self.add("OneHotEncoder", cells, domain=ML_DOMAIN, cats_strings=list(column.levels), zeros=1)
        return self.add("Reshape", one_hot, self.constant([-1, len(column.levels)], np.int64))

    def _number(self, column: Number) -> str:
        value = self.add("Unsqueeze", column.name, self.constant([1], np.int64))
        if column.fill is not None:
            missing = self.add("IsNaN", value)
            if column.zero_is_missing:
                missing = self.add("Or", missing, self.add("Equal", value, self.constant(0.0)))
            value = self.add("Where", missing, self.constant(column.fill), value)
        if column.equals is not None:
            value = self.add("Cast", self.add("Equal", value, self.constant(column.equals)), to=TensorProto.DOUBLE)
        if column.scaling == "log1p":
            value = self.add("Log", self.add("Add", value, self.constant(1.0)))
        value = self.add("Div", self.add("Sub", value, self.constant(column.centre)), self.constant(column.spread))
        if column.scaling == "arcsinh":
            value = self._arcsinh(value)
        return self.add("Cast", value, to=TensorProto.FLOAT)

    def _arcsinh(self, value: str) -> str:
        """Return ``sign(v) log(|v| + sqrt(v^2 + 1))``, because runtimes have the function for 32 bits only."""
        root = self.add("Sqrt", self.add("Add", self.add("Mul", value, value), self.constant(1.0)))
        size = self.add("Log", self.add("Add", self.add("Abs", value), root))
        return self.add("Mul", self.add("Sign", value), size)

    def add_predictions(self, target: Target) -> None:
        """Add the outputs ``prediction`` and ``probabilities``, if the model has one prediction for each example."""
        if target.task.name not in PREDICTED_TASKS or self.num_axes != 2:
            return
        self._nodes = self.last
        if target.task.name == "regression":
            self._add_values(target)
            return
        probabilities = self._probabilities(target)
        number = self.add("ArgMax", probabilities, axis=1, keepdims=0)
        keys, names = list(range(len(target.classes))), list(target.classes)
        label = self.add("LabelEncoder", number, domain=ML_DOMAIN, keys_int64s=keys, values_strings=names)
        self._output("prediction", TensorProto.STRING, [BATCH], label)
        self._output("probabilities", TensorProto.FLOAT, [BATCH, len(names)], probabilities)

    def _probabilities(self, target: Target) -> str:
        if target.task.name != "binary":
            return self.add("Softmax", self.outputs, axis=1)
        logit = self.add("Gather", self.outputs, self.constant([0], np.int64), axis=1)
        negative, positive = self.add("Sigmoid", self.add("Neg", logit)), self.add("Sigmoid", logit)
        return self.add("Concat", negative, positive, axis=1)

    def _add_values(self, target: Target) -> None:
        value = self.add("Cast", self.outputs, to=TensorProto.DOUBLE)
        value = self.add("Gather", value, self.constant(0, np.int64), axis=1)
        value = self.add("Mul", value, self.constant(target.spread))
        value = self.add("Add", value, self.constant(target.centre))
        self._output("prediction", TensorProto.DOUBLE, [BATCH], value)

    def finish(self) -> None:
        """Put the nodes into the graph, before and after the network."""
        network = list(self.graph.node)
        del self.graph.node[:]
        self.graph.node.extend([*self.first, *network, *self.last])
        if not any(opset.domain == ML_DOMAIN for opset in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(ML_DOMAIN, ML_VERSION))
