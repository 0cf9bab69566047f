"""Train clients under a local rule: start parameters, passes, and the new client states.

Each rule needs only `Trainer.fit`, called once or several times, with different start parameters and corrections.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import GLOBAL_MODEL, PREVIOUS_MODEL, LocalRule, plain_training
from fedlearn.algorithm.server_optimizers import zeros
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.layout import Layout
from fedlearn.core.optimizers import STEPS
from fedlearn.core.records import Array, ClientWork, Request, State, Updates
from fedlearn.loop.local_aggregation import initial_weights, mix_models
from fedlearn.loop.optimizer_averaging import receive_states, send_states
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.rule_support import require_support

# names in a client state; a dot prevents conflicts with argument names of a rule's functions
PERSONAL_PARAMETERS, PERSONAL_MODEL, RECEIVED_MODEL = "local.kept", "local.personal", "local.received"


def initial_rule_state(rule: LocalRule, layout: Layout, params_D: Array) -> dict[str, np.ndarray]:
    """Return the client state of a rule before the first round.

    Args:
        rule: the local rule.
        layout: layout of the model.
        params_D: the global model of the first round of the client.
    """
    state = {name: zeros(layout) for name in (*rule.client_state, *rule.optimizer_state)}
    if rule.optimizer_state:
        state[STEPS] = np.zeros(1, np.float32)
    if rule.personal_parameters:
        state[PERSONAL_PARAMETERS] = as_numpy(params_D)[layout.positions(rule.personal_parameters)]
    if rule.personal:
        state[PERSONAL_MODEL] = np.array(as_numpy(params_D))
    if rule.previous_model:
        state[PREVIOUS_MODEL] = np.array(as_numpy(params_D))
    if rule.aggregation:
        state |= initial_weights(rule.aggregation, layout)
    return state


def personal_model(rule: LocalRule, layout: Layout, params_D: Array, client_state: State) -> np.ndarray:
    """Return the parameters with which a client predicts.

    They are its personal model, or the global model with its personal parameters.
    """
    if rule.personal:
        return as_numpy(rule.personal.start(np.asarray(client_state[PERSONAL_MODEL]), as_numpy(params_D)))
    return _with_personal_parameters(rule, layout, params_D, client_state)


def train(trainer: Trainer, rule: LocalRule, request: Request, work: Sequence[ClientWork]) -> Updates:
    """Train K clients under a rule. The client states of the result have their personal parameters and models.

    Raises:
        SettingError: The trainer or the local settings do not support the rule; see `require_support`.
    """
    require_support(trainer, rule, request.local)
    layout = trainer.layout
    work = receive_states(rule, request, work) if rule.averages_optimizer else work
    losses, best_K = _evaluate_models(trainer, rule, request, work)
    if rule.start is not None:
        work = [item._replace(start_D=rule.start(layout, as_numpy(request.params_D), item.client)) for item in work]
    if rule.personal_parameters or rule.evaluate_models:
        work = [_with_start(rule, layout, request, item, name) for item, name in zip(work, best_K, strict=True)]
    state: dict[str, Any] = {}
    if rule.aggregation:
        personal = [item.client_state[PERSONAL_MODEL] for item in work]
        work, state = mix_models(trainer, rule, request, work, personal)
    updates = _fit_in_parts(trainer, rule, request, work) if rule.personal_epochs else trainer.fit(request, rule, work)
    if rule.personal_parameters:
        final_KD = _final_parameters(request, work, updates)
        state[PERSONAL_PARAMETERS] = final_KD[:, layout.positions(rule.personal_parameters)]
    if rule.personal:
        state[PERSONAL_MODEL] = _train_personal(trainer, rule, request, work, updates)
    if rule.previous_model:
        state[PREVIOUS_MODEL] = _final_parameters(request, work, updates)
    state = {**updates.client_state, **state}
    if rule.aggregation:  # the server averages models, so the update is the difference to the received model
        final_KD = _final_parameters(request, work, updates)
        updates = replace(updates, delta_KD=final_KD - asarray_like(request.params_D, final_KD))
    updates = replace(updates, client_state=state, metrics={**updates.metrics, **losses})
    return send_states(rule, updates) if rule.averages_optimizer else updates


def train_mixed_rounds(
    trainer: Trainer, rule: LocalRule, requests: Sequence[Request], work: Sequence[ClientWork]
) -> Updates:
    """Train K clients, each with a different request, under a rule that supports mixed rounds.

    The requests share seed and settings. They differ in the round, the model and the broadcast values. The trainer
    receives these values as part of the client states.
    """
    new_work = [
        item._replace(
            round=request.round,
            start_D=request.params_D,
            client_state={
                **item.client_state,
                RECEIVED_MODEL: request.params_D,
                **{name: request.broadcast[name] for name in rule.receives},
            },
        )
        for request, item in zip(requests, work, strict=True)
    ]
    updates = trainer.fit(requests[0], _reading_client_state(rule), new_work)
    if rule.personal is None:
        return updates
    personal_KD = _final_parameters(requests[0], new_work, updates)
    return replace(updates, client_state={**updates.client_state, PERSONAL_MODEL: personal_KD})


@lru_cache(maxsize=64)  # one rule object for all blocks, because compiled programs and process pools are cached by rule
def _reading_client_state(rule: LocalRule) -> LocalRule:
    """Return the rule for client states that contain the received model and the broadcast values."""
    if rule.correct is plain_training.correct:
        return rule._replace(receives=())

    def correct(grad: Any, w: Any, w_global: Any, **vectors: Any) -> Any:
        return rule.correct(grad, w, vectors.pop(RECEIVED_MODEL), **vectors)

    return rule._replace(
        correct=correct, client_state=(*rule.client_state, RECEIVED_MODEL, *rule.receives), receives=()
    )


def _with_start(rule: LocalRule, layout: Layout, request: Request, work: ClientWork, name: str) -> ClientWork:
    """Return the work with this received model and the personal parameters as its start parameters."""
    if name == GLOBAL_MODEL and not rule.personal_parameters:
        return work
    model_D = request.params_D if name == GLOBAL_MODEL else request.broadcast[name]
    return work._replace(start_D=_with_personal_parameters(rule, layout, model_D, work.client_state))


def _with_personal_parameters(rule: LocalRule, layout: Layout, params_D: Array, client_state: State) -> np.ndarray:
    if not rule.personal_parameters:
        return as_numpy(params_D)
    model_D = np.array(as_numpy(params_D))
    model_D[layout.positions(rule.personal_parameters)] = client_state[PERSONAL_PARAMETERS]
    return model_D


def _final_parameters(request: Request, work: Sequence[ClientWork], updates: Updates) -> Array:
    """Return the parameters after local training, ``(K, D)``."""
    if all(item.start_D is None for item in work):
        return asarray_like(request.params_D, updates.delta_KD) + updates.delta_KD
    starts = [as_numpy(request.params_D if item.start_D is None else item.start_D) for item in work]
    return asarray_like(np.stack(starts), updates.delta_KD) + updates.delta_KD


def _evaluate_models(
    trainer: Trainer, rule: LocalRule, request: Request, work: Sequence[ClientWork]
) -> tuple[dict[str, Any], list[str]]:
    """Return the loss of each received model that the rule compares, and the name of the best model of each client.

    A pass with learning rate 0 computes the loss of every example once, and does not change the model.
    """
    changes: dict[str, Any] = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "schedule": "constant",
        "optimizer_state": "reset",
        "example_dp": None,
    }
    local = replace(request.local, learning_rate=0.0, epochs=1, steps=None, **changes)
    losses = {}
    for name in rule.evaluate_models:
        new_work = [_with_start(rule, trainer.layout, request, item, name) for item in work]
        losses[f"loss/{name}"] = trainer.fit(replace(request, local=local), plain_training, new_work).metrics["loss"]
    if not losses:
        return {}, [GLOBAL_MODEL] * len(work)
    loss_MK = np.stack([loss.total_K / loss.count_K for loss in losses.values()])
    return losses, [rule.evaluate_models[m] for m in np.argmin(np.nan_to_num(loss_MK, nan=np.inf), axis=0)]


def _fit_in_parts(trainer: Trainer, rule: LocalRule, request: Request, work: Sequence[ClientWork]) -> Updates:
    """Train the personal parameters with fixed shared parameters, then the shared with fixed personal parameters."""
    personal_D = np.zeros(trainer.layout.num_parameters, np.float32)
    personal_D[trainer.layout.positions(rule.personal_parameters)] = 1
    shared_D = 1 - personal_D
    for mask_D in (personal_D, shared_D):  # forward passes change batch statistics in both parts
        mask_D[trainer.layout.positions(trainer.layout.buffers)] = 1
    local = replace(request.local, epochs=rule.personal_epochs, steps=None)
    first = trainer.fit(_with_mask(replace(request, local=local), personal_D), _masked(rule), work)
    # the mask applies to gradients, but weight decay changes all parameters
    first = replace(first, delta_KD=first.delta_KD * asarray_like(personal_D, first.delta_KD))
    final_KD = as_numpy(_final_parameters(request, work, first))
    work = [item._replace(start_D=final_KD[k]) for k, item in enumerate(work)]
    second = trainer.fit(_with_mask(request, shared_D), _masked(rule), work)
    return replace(second, delta_KD=first.delta_KD + second.delta_KD * asarray_like(shared_D, second.delta_KD))


def _with_mask(request: Request, mask_D: np.ndarray) -> Request:
    return replace(request, broadcast={**request.broadcast, "moves": mask_D})


@lru_cache(maxsize=64)  # one rule object for all rounds, because compiled programs and process pools are cached by rule
def _masked(rule: LocalRule) -> LocalRule:
    """Return the rule, restricted to the parameters for which the broadcast vector ``moves`` is 1."""

    def correct(grad: Any, w: Any, w_global: Any, moves: Any, **vectors: Any) -> Any:
        return moves * rule.correct(grad, w, w_global, **vectors)

    gradient, penalty = (f and _without_mask(f) for f in (rule.gradient, rule.penalty))
    return rule._replace(correct=correct, gradient=gradient, penalty=penalty, receives=(*rule.receives, "moves"))


def _without_mask(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a rule that ignores the broadcast vector ``moves``."""

    def without_mask(*arguments: Any, moves: Any, **vectors: Any) -> Any:
        return function(*arguments, **vectors)

    return without_mask


def _train_personal(
    trainer: Trainer, rule: LocalRule, request: Request, work: Sequence[ClientWork], updates: Updates
) -> Array:
    """Return the personal models after this round. They stay at the clients, so training adds no noise."""
    personal = rule.personal
    assert personal is not None
    if personal.correct is None:
        return _final_parameters(request, work, updates)
    old_KD = np.stack([as_numpy(item.client_state[PERSONAL_MODEL]) for item in work])
    start_KD = personal.start(old_KD, as_numpy(request.params_D))
    new_work = [item._replace(start_D=start_KD[k]) for k, item in enumerate(work)]
    request = replace(request, local=replace(request.local, example_dp=None))
    delta_KD = trainer.fit(request, _personal_rule(rule), new_work).delta_KD
    return personal.after_training(asarray_like(old_KD, delta_KD), delta_KD)


@lru_cache(maxsize=64)
def _personal_rule(rule: LocalRule) -> LocalRule:
    """Return the rule that trains the personal model."""
    assert rule.personal is not None
    assert rule.personal.correct is not None
    return LocalRule(correct=rule.personal.correct, adjust_logits=rule.adjust_logits)
