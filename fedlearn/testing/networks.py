"""Network in NumPy that supports all local rules, for problems of the conformance kit.

Shapes: D parameters, N examples, B batch with padding, F features, H hidden units, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np

from fedlearn.algorithm.batch import Batch, ModelOutputs
from fedlearn.algorithm.local_rule import HOOKS, PREVIOUS_MODEL, LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientWork, Request
from fedlearn.trainers.base import BaseTrainer, LocalResult

RowLoss = Callable[[np.ndarray], np.ndarray]  # one number per row


class HiddenLayerTrainer(BaseTrainer):
    """Classify with one hidden layer, with adjusted logits and penalties in the loss.

    Derivatives by outputs and features are central differences, because a rule gives no gradients. ``w_global`` and
    other models of a penalty count as constants.

    Args:
        num_features: number of features of an example.
        num_classes: number of classes.
        num_hidden: number of hidden units, which are the features of a `Batch`.
        shifts: names of additional parameters; each is added to the hidden layer.
        num_padding: number of rows of padding in each batch, >= 0. They must not change the result.
    """

    rule_hooks = frozenset(HOOKS)

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        num_hidden: int = 4,
        shifts: Sequence[str] = (),
        num_padding: int = 0,
    ) -> None:
        self.shifts, self.num_classes, self.num_padding = tuple(shifts), num_classes, num_padding
        self.layout = Layout.from_shapes(
            [
                ("hidden.weight", (num_hidden, num_features)),
                ("hidden.bias", (num_hidden,)),
                ("out.weight", (num_classes, num_hidden)),
                ("out.bias", (num_classes,)),
                *((name, (num_hidden,)) for name in self.shifts),
            ]
        )
        self.rule, self.counts_C = LocalRule(), np.ones(num_classes)
        self.global_D = np.zeros(0)
        self.vectors: dict[str, np.ndarray] = {}

    def features(self, params_D: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the hidden layer, ``(N, H)``, in float64."""
        leaves = self.layout.unpack(np.asarray(params_D))
        shift_H = sum((leaves[name] for name in self.shifts), leaves["hidden.bias"])
        return np.tanh(x.astype(np.float64) @ leaves["hidden.weight"].T + shift_H)

    def outputs(self, params_D: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the logits, ``(N, C)``."""
        leaves = self.layout.unpack(np.asarray(params_D))
        return self.features(params_D, x) @ leaves["out.weight"].T + leaves["out.bias"]

    def fit_client(self, request: Request, rule: LocalRule, work: ClientWork) -> LocalResult:
        """Train one client with the loss of the rule."""
        bound = copy(self)
        bound.rule = rule
        bound.counts_C = np.bincount(work.examples.y, minlength=self.num_classes).astype(np.float64)
        bound.global_D = as_numpy(request.params_D)
        bound.vectors = {name: as_numpy(work.client_state[name]) for name in rule.client_state}
        bound.vectors |= {name: as_numpy(request.broadcast[name]) for name in rule.receives}
        if rule.previous_model:
            bound.vectors["w_previous"] = as_numpy(work.client_state[PREVIOUS_MODEL])
        return super(HiddenLayerTrainer, bound).fit_client(request, rule, work)

    def gradient(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of each example, and the gradient of its mean."""
        features_NH, leaves = self.features(params_D, x), self.layout.unpack(np.asarray(params_D))
        logits_NC = features_NH @ leaves["out.weight"].T + leaves["out.bias"]
        slope_NC = _slopes(lambda rows: self._cross_entropy(rows, y), logits_NC)
        penalty_N, by_features_NH, by_outputs_NC = self._penalty(params_D, x, y)
        slope_NC = slope_NC + by_outputs_NC
        slope_NH = (by_features_NH + slope_NC @ leaves["out.weight"]) * (1 - features_NH**2)
        gradients = {
            "out.weight": slope_NC.T @ features_NH / len(x),
            "out.bias": slope_NC.mean(axis=0),
            "hidden.weight": slope_NH.T @ x / len(x),
            **dict.fromkeys(("hidden.bias", *self.shifts), slope_NH.mean(axis=0)),
        }
        return self._cross_entropy(logits_NC, y) + penalty_N, self.layout.pack(gradients)

    def _cross_entropy(self, logits_NC: np.ndarray, y: np.ndarray) -> np.ndarray:
        if self.rule.adjust_logits is not None:
            logits_NC = np.asarray(self.rule.adjust_logits(logits_NC, self.counts_C))
        shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
        loss_N: np.ndarray = np.log(np.exp(shifted_NC).sum(axis=1)) - shifted_NC[np.arange(len(y)), y]
        return loss_N

    def _penalty(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the penalty of each example, and its derivatives by features and outputs, times the batch size."""
        count, penalty = len(x), self.rule.penalty
        if penalty is None:
            return np.zeros(count), np.zeros((count, 1)), np.zeros((count, self.num_classes))
        padding = self.num_padding
        x_B, y_B = (np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)]) for rows in (x, y))
        mask_B = np.arange(len(x_B)) < count
        runs: dict[bytes, ModelOutputs] = {}

        def run(other_D: np.ndarray) -> ModelOutputs:
            key = np.asarray(other_D).tobytes()
            if key not in runs:
                features_BH = self.features(other_D, x_B)
                runs[key] = ModelOutputs(outputs=self.outputs(other_D, x_B), read_features=lambda: features_BH)
            return runs[key]

        def values(features_BH: np.ndarray, outputs_BC: np.ndarray) -> np.ndarray:
            batch = Batch(outputs=outputs_BC, read_features=lambda: features_BH, targets=y_B, mask=mask_B, run=run)
            result = np.asarray(penalty(batch, self.global_D, **self.vectors))
            return np.broadcast_to(result, (len(x_B),))[:count]

        features_BH, outputs_BC = self.features(params_D, x_B), self.outputs(params_D, x_B)
        slopes = _coupled_slopes if self.rule.couples_examples else _slopes
        by_features = slopes(lambda rows: values(_padded(rows, features_BH), outputs_BC), features_BH[:count])
        by_outputs = slopes(lambda rows: values(features_BH, _padded(rows, outputs_BC)), outputs_BC[:count])
        return values(features_BH, outputs_BC), by_features, by_outputs


def _padded(rows_NC: np.ndarray, all_BC: np.ndarray) -> np.ndarray:
    """Return the rows, followed by the rows of padding of a batch."""
    return np.concatenate([rows_NC, all_BC[len(rows_NC) :]])


def _slopes(loss: RowLoss, rows_NC: np.ndarray, *, step: float = 1e-4) -> np.ndarray:
    """Return the derivative of each loss by each column of its row, ``(N, C)``."""
    moves = step * np.eye(rows_NC.shape[1])
    return np.stack([(loss(rows_NC + move) - loss(rows_NC - move)) / (2 * step) for move in moves], axis=1)


def _coupled_slopes(loss: RowLoss, rows_NC: np.ndarray, *, step: float = 1e-4) -> np.ndarray:
    """Return the derivative of the sum of the losses by each number, ``(N, C)``."""
    moves = step * np.eye(rows_NC.size).reshape(-1, *rows_NC.shape)
    slopes = [np.sum(loss(rows_NC + move) - loss(rows_NC - move)) / (2 * step) for move in moves]
    return np.reshape(slopes, rows_NC.shape)
