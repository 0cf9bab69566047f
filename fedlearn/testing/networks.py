"""Network in NumPy that supports all local rules, for problems of the conformance kit.

Shapes: D parameters, N examples, F features, H hidden units, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np

from fedlearn.algorithm.local_rule import PREVIOUS_MODEL, LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientWork, Request
from fedlearn.trainers.base import BaseTrainer, LocalResult

RowLoss = Callable[[np.ndarray], np.ndarray]  # one number per row


class HiddenLayerTrainer(BaseTrainer):
    """Classify with one hidden layer, with adjusted logits and feature penalties in the loss.

    Derivatives by outputs and features are central differences, because a rule gives no gradients.

    Args:
        num_features: number of features of an example.
        num_classes: number of classes.
        num_hidden: number of hidden units, which are the features of `LocalRule.feature_penalty`.
        shifts: names of additional parameters; each is added to the hidden layer.
    """

    def __init__(self, num_features: int, num_classes: int, *, num_hidden: int = 4, shifts: Sequence[str] = ()) -> None:
        self.shifts, self.num_classes = tuple(shifts), num_classes
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
        self.compared: tuple[np.ndarray, ...] = ()

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
        if rule.feature_penalty is not None:
            bound.compared = (as_numpy(request.params_D), as_numpy(work.client_state[PREVIOUS_MODEL]))
        return super(HiddenLayerTrainer, bound).fit_client(request, rule, work)

    def gradient(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of each example, and the gradient of its mean."""
        features_NH, leaves = self.features(params_D, x), self.layout.unpack(np.asarray(params_D))
        logits_NC = features_NH @ leaves["out.weight"].T + leaves["out.bias"]
        penalty_N, slope_NH = self._penalty(features_NH, x)
        slope_NC = _slopes(lambda rows: self._cross_entropy(rows, y), logits_NC)
        slope_NH = (slope_NH + slope_NC @ leaves["out.weight"]) * (1 - features_NH**2)
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

    def _penalty(self, features_NH: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        penalty = self.rule.feature_penalty
        if penalty is None:
            return np.zeros(len(x)), np.zeros_like(features_NH)
        others = [self.features(params_D, x) for params_D in self.compared]
        return np.asarray(penalty(features_NH, *others)), _slopes(lambda rows: penalty(rows, *others), features_NH)

    def _refuse_unsupported(self, request: Request, rule: LocalRule) -> None:
        super()._refuse_unsupported(request, rule._replace(adjust_logits=None, feature_penalty=None))


def _slopes(loss: RowLoss, rows_NC: np.ndarray, *, step: float = 1e-4) -> np.ndarray:
    """Return the derivative of each loss by each column of its row, ``(N, C)``."""
    moves = step * np.eye(rows_NC.shape[1])
    return np.stack([(loss(rows_NC + move) - loss(rows_NC - move)) / (2 * step) for move in moves], axis=1)
