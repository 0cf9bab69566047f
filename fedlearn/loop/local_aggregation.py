"""Mix the received model and the personal model of each client before local training (adaptive local aggregation).

Shapes: K clients in a block, D parameters, P parameters with a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import LocalAggregation, LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, ClientWork, Request
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer

# names in a client state: weights of the received model, and number of rounds that trained them
WEIGHTS, NUM_ADAPTATIONS = "local.weights", "local.adaptations"
OLD_MODEL = "old_model"  # personal model, as a vector of the rule that trains the weights
MIN_DIFFERENCE = 1e-3  # relative difference of two parameters, below which rounding determines their weight


def initial_weights(rule: LocalAggregation, layout: Layout) -> dict[str, np.ndarray]:
    """Return the client state before the first round: the received model has weight 1."""
    num_weights = len(weighted_positions(rule, layout))
    return {WEIGHTS: np.ones(num_weights, np.float32), NUM_ADAPTATIONS: np.zeros(1, np.float32)}


def weighted_positions(rule: LocalAggregation, layout: Layout) -> np.ndarray:
    """Return the positions of the parameters with weights, ascending. Buffers have no gradient, so they have none."""
    return np.setdiff1d(layout.positions(rule.parameters), layout.positions(layout.buffers))


def mix_models(
    trainer: Trainer, rule: LocalRule, request: Request, work: Sequence[ClientWork], personal: Sequence[Array]
) -> tuple[list[ClientWork], dict[str, np.ndarray]]:
    """Train the weights of K clients; return the work with its initial models, and the new client states.

    A client without an earlier update has equal models and trains no weights. Its next round trains until the loss
    converges. All later rounds make one pass.

    Args:
        trainer: trainer of the model.
        rule: local rule with `LocalRule.aggregation`.
        request: the request, with the received model.
        work: the K clients.
        personal: personal model of each client.

    Raises:
        SettingError: The request asks for DP-SGD. The initial model would depend on the data without noise.
    """
    aggregation, dp = rule.aggregation, request.local.example_dp
    assert aggregation is not None
    expected = "null, because the initial model of this strategy depends on the examples without noise"
    require(dp is None, "local.example_dp", dp, expected, "strategy=fedavg")
    positions = weighted_positions(aggregation, trainer.layout)
    global_D = as_numpy(request.params_D)
    old_KD = np.tile(global_D, (len(work), 1))
    old_KD[:, positions] = [as_numpy(model_D)[positions] for model_D in personal]
    weights_KP = np.stack([np.asarray(item.client_state[WEIGHTS]) for item in work])
    count_K1 = np.stack([np.asarray(item.client_state[NUM_ADAPTATIONS]) for item in work])
    start_KD = np.tile(global_D, (len(work), 1))
    start_KD[:, positions] = old_KD[:, positions] + weights_KP * (global_D[positions] - old_KD[:, positions])
    differs_K = (old_KD != global_D).any(axis=1)
    max_passes_K = np.where(differs_K, np.where(count_K1[:, 0] == 0, aggregation.max_passes, 1), 0)
    start_KD = _train(trainer, rule, request, work, old_KD, start_KD, max_passes_K)
    state = {
        WEIGHTS: _weights(start_KD[:, positions], old_KD[:, positions], global_D[positions], weights_KP),
        NUM_ADAPTATIONS: count_K1 + differs_K[:, None].astype(np.float32),
    }
    return [item._replace(start_D=start_KD[k]) for k, item in enumerate(work)], state


def _train(
    trainer: Trainer,
    rule: LocalRule,
    request: Request,
    work: Sequence[ClientWork],
    old_KD: np.ndarray,
    start_KD: np.ndarray,
    max_passes_K: np.ndarray,
) -> np.ndarray:
    """Return the mixtures after passes with fixed models. A client stops if its loss falls by less than a share.

    All clients of the block take part in each pass, so that compiled programs have one size.
    """
    assert rule.aggregation is not None
    plain: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    local = replace(request.local, epochs=1, steps=None, learning_rate=1.0, max_grad_norm=None, **plain)
    request = replace(request, local=replace(local, optimizer_state="reset"))
    weight_rule, last_loss_K = _weight_rule(rule), np.full(len(work), np.inf)
    for number in range(int(max_passes_K.max(initial=0))):
        states = [{OLD_MODEL: old_D} for old_D in old_KD]
        new_work = [
            item._replace(start_D=start_D, client_state=state)
            for item, start_D, state in zip(work, start_KD, states, strict=True)
        ]
        updates = trainer.fit(request, weight_rule, new_work)
        loss_K = updates.metrics["loss"].client_means()
        moves_KD = (number < max_passes_K)[:, None] & (old_KD != as_numpy(request.params_D))  # no buffers of the model
        start_KD = np.where(moves_KD, start_KD + as_numpy(updates.delta_KD), start_KD)
        is_converged_K = loss_K > (1 - rule.aggregation.tolerance) * last_loss_K
        max_passes_K = np.where(is_converged_K, np.minimum(max_passes_K, number + 1), max_passes_K)
        last_loss_K = loss_K
        if (max_passes_K <= number + 1).all():
            break
    return start_KD


@lru_cache(maxsize=64)  # one rule object for all rounds, because compiled programs and process pools are cached by rule
def _weight_rule(rule: LocalRule) -> LocalRule:
    """Return the rule that moves each mixture by a gradient step on its weights.

    The mixture is ``v + W (w - v)`` of the personal model v and the received model w, so the gradient of the weights is
    ``(w - v) grad``. A step of size 1 then moves the mixture by ``-rate (w - v)^2 grad``, between v and w.
    """
    assert rule.aggregation is not None
    rate = rule.aggregation.learning_rate

    def correct(grad: Any, w: Any, w_global: Any, old_model: Any) -> Any:
        difference = w_global - old_model
        half_width = abs(difference) / 2
        offset = w - rate * difference * difference * grad - (w_global + old_model) / 2
        bounded = (abs(offset + half_width) - abs(offset - half_width)) / 2  # offset in [-half_width, half_width]
        return w - (w_global + old_model) / 2 - bounded

    return LocalRule(correct=correct, client_state=(OLD_MODEL,), adjust_logits=rule.adjust_logits)


def _weights(start_KP: np.ndarray, old_KP: np.ndarray, global_P: np.ndarray, weights_KP: np.ndarray) -> np.ndarray:
    """Return the weights of the received model in each mixture, in [0, 1].

    A weight does not change where both models are nearly equal.
    """
    difference_KP = global_P - old_KP
    is_clear_KP = np.abs(difference_KP) > MIN_DIFFERENCE * (np.abs(old_KP) + np.abs(global_P))
    new_KP = (start_KP - old_KP) / np.where(is_clear_KP, difference_KP, 1)
    return np.where(is_clear_KP, np.clip(new_KP, 0, 1), weights_KP).astype(np.float32)
