"""Find the parameters of a model that reveal its inputs and labels. The search tests the attack, not names of layers.

Shapes: B victims, D parameters, F inputs, O outputs of a layer, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlearn.core.layout import Layout
from fedlearn.core.records import Examples
from fedlearn.errors import require
from fedlearn.privacy.gradient_inversion_attack import pearson_correlation, reconstruct_inputs, reconstruct_labels

MIN_CORRELATION = 0.9  # median correlation of inputs that an affine first layer gives without protection
MIN_ACCURACY = 0.9  # accuracy of labels that the last bias gives without protection


@dataclass(frozen=True, kw_only=True)
class AttackedLayers:
    """Parameters that the attack reads.

    Attributes:
        weight: name of the weight of an affine first layer.
        bias: name of its bias.
        label_bias: name of a bias whose gradient reveals the label; empty if there is none.
    """

    weight: str
    bias: str
    label_bias: str = ""

    def inputs(self, layout: Layout, gradient_BD: np.ndarray) -> np.ndarray:
        """Return the recovered inputs, ``(B, F)``."""
        biases_BO = gradient_BD[:, layout.slices[self.bias]]
        weights_BOF = gradient_BD[:, layout.slices[self.weight]].reshape(*biases_BO.shape, -1)
        return reconstruct_inputs(weights_BOF, biases_BO)

    def labels(self, layout: Layout, gradient_BD: np.ndarray) -> np.ndarray | None:
        """Return the recovered labels, ``(B,)``; None if no bias reveals them."""
        if not self.label_bias:
            return None
        biases_BC = gradient_BD[:, layout.slices[self.label_bias]]
        return (biases_BC[:, 0] < 0).astype(np.int64) if biases_BC.shape[1] == 1 else reconstruct_labels(biases_BC)


def find_layers(layout: Layout, gradient_BD: np.ndarray, victims: Examples, model: str) -> AttackedLayers:
    """Return the parameters that reveal inputs and labels of unprotected updates.

    Args:
        layout: layout of the model.
        gradient_BD: gradients of single victims, without protection.
        victims: the true examples.
        model: name of the model, for the error.

    Raises:
        SettingError: no layer reveals the inputs.
    """
    true_BF = np.asarray(victims.x, np.float64).reshape(len(victims), -1)
    found = [
        layers
        for layers in _affine_layers(layout, true_BF.shape[1])
        if np.median(pearson_correlation(layers.inputs(layout, gradient_BD), true_BF)) > MIN_CORRELATION
    ]
    expected = "a model with an affine first layer (weight and bias): the attack recovers inputs from its gradient"
    require(bool(found), "model", model, expected, "model=mlp")
    first = found[0]
    for leaf in layout.trainable.leaves:
        if len(leaf.shape) != 1:
            continue
        guess = AttackedLayers(weight=first.weight, bias=first.bias, label_bias=leaf.name)
        labels_B = guess.labels(layout, gradient_BD)
        if len(np.unique(victims.y)) > 1 and np.mean(labels_B == victims.y) > MIN_ACCURACY:
            return guess
    return first


def _affine_layers(layout: Layout, num_inputs: int) -> list[AttackedLayers]:
    """Return pairs of a weight ``(O, F)`` and a bias ``(O,)`` in the same module."""
    shapes = {leaf.name: leaf.shape for leaf in layout.trainable.leaves}
    pairs = []
    for name, shape in shapes.items():
        bias = f"{name.rpartition('.')[0]}.bias".lstrip(".")
        if len(shape) == 2 and shape[1] == num_inputs and shapes.get(bias) == shape[:1]:
            pairs.append(AttackedLayers(weight=name, bias=bias))
    return pairs
