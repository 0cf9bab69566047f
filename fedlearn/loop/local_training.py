"""A client's local training under a rule: where it begins, in which parts, and what the client keeps of it.

Shapes: K clients in a block, D parameters laid flat.

Whatever a rule asks for is done by the trainer's one `fit`, once or several times, with other starts and corrections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import GLOBAL_MODEL, PREVIOUS_MODEL, LocalRule, plain_training
from fedlearn.algorithm.server_optimizers import zeros
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, ClientWork, Request, State, Updates
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer

# in a client's memory: no names that a rule's function could take
PERSONAL_PARAMETERS, PERSONAL_MODEL, RECEIVED_MODEL = "local.kept", "local.personal", "local.received"


def initial_rule_state(rule: LocalRule, layout: Layout, params_D: Array) -> dict[str, np.ndarray]:
    """What the rule lets a client remember before its first round, in which it receives ``params_D``."""
    memory = {name: zeros(layout) for name in rule.client_state}
    if rule.personal_parameters:
        memory[PERSONAL_PARAMETERS] = as_numpy(params_D)[layout.positions(rule.personal_parameters)]
    if rule.personal:
        memory[PERSONAL_MODEL] = np.array(as_numpy(params_D))
    if rule.feature_penalty:
        memory[PREVIOUS_MODEL] = np.array(as_numpy(params_D))
    return memory


def personal_model(rule: LocalRule, layout: Layout, params_D: Array, client_state: State) -> np.ndarray:
    """The parameters with which a client predicts: its personal model, or the global one with what it keeps."""
    if rule.personal:
        return as_numpy(rule.personal.start(np.asarray(client_state[PERSONAL_MODEL]), as_numpy(params_D)))
    return _with_kept(rule, layout, params_D, client_state)


def train(trainer: Trainer, rule: LocalRule, request: Request, work: Sequence[ClientWork]) -> Updates:
    """Train K clients; ``memory`` of the result holds what they keep of their models.

    Raises:
        SettingError: noise on examples' gradients is asked for, with a loss that it is not made for.
    """
    dp = request.local.example_dp
    expected = "null with a strategy that trains with another loss than the task's"
    require(dp is None or not rule.has_custom_loss, "local.example_dp", dp, expected, "strategy=fedavg")
    layout = trainer.layout
    told, best_K = _compare(trainer, rule, request, work)
    if rule.personal_parameters or rule.evaluate_models:
        work = [_beginning(rule, layout, request, one, name) for one, name in zip(work, best_K, strict=True)]
    updates = _in_parts(trainer, rule, request, work) if rule.personal_epochs else trainer.fit(request, rule, work)
    memory = {}
    if rule.personal_parameters:
        memory[PERSONAL_PARAMETERS] = _ends(request, work, updates)[:, layout.positions(rule.personal_parameters)]
    if rule.personal:
        memory[PERSONAL_MODEL] = _train_personal(trainer, rule, request, work, updates)
    if rule.feature_penalty:
        memory[PREVIOUS_MODEL] = _ends(request, work, updates)
    return replace(updates, client_state=memory, metrics={**updates.metrics, **told})


def train_mixed_rounds(
    trainer: Trainer, rule: LocalRule, requests: Sequence[Request], work: Sequence[ClientWork]
) -> Updates:
    """Train K clients, each by an order of its own, under a rule that mixes.

    They share seed and settings, and differ in the round and in what the server sent: to the trainer that is the
    client's own, as its memory is.
    """
    there = [
        one._replace(
            round=order.round,
            start_D=order.params_D,
            client_state={
                **one.client_state,
                RECEIVED_MODEL: order.params_D,
                **{name: order.broadcast[name] for name in rule.receives},
            },
        )
        for order, one in zip(requests, work, strict=True)
    ]
    return trainer.fit(requests[0], _received(rule), there)


@lru_cache(maxsize=64)  # the same rule from block to block: compiled programs and workers are kept by it
def _received(rule: LocalRule) -> LocalRule:
    """The rule, for clients that bring what the server sent."""
    if rule.correct is plain_training.correct:
        return rule._replace(receives=())

    def correct(grad: Any, w: Any, w_global: Any, **vectors: Any) -> Any:
        return rule.correct(grad, w, vectors.pop(RECEIVED_MODEL), **vectors)

    return rule._replace(
        correct=correct, client_state=(*rule.client_state, RECEIVED_MODEL, *rule.receives), receives=()
    )


def _beginning(rule: LocalRule, layout: Layout, order: Request, one: ClientWork, name: str) -> ClientWork:
    """The work, to begin at one of the received models with what the client keeps."""
    if name == GLOBAL_MODEL and not rule.personal_parameters:
        return one
    model_D = order.params_D if name == GLOBAL_MODEL else order.broadcast[name]
    return one._replace(start_D=_with_kept(rule, layout, model_D, one.client_state))


def _with_kept(rule: LocalRule, layout: Layout, params_D: Array, memory: State) -> np.ndarray:
    if not rule.personal_parameters:
        return as_numpy(params_D)
    own_D = np.array(as_numpy(params_D))
    own_D[layout.positions(rule.personal_parameters)] = memory[PERSONAL_PARAMETERS]
    return own_D


def _ends(order: Request, work: Sequence[ClientWork], updates: Updates) -> Array:
    """The models at which training ended, K x D."""
    if all(one.start_D is None for one in work):
        return asarray_like(order.params_D, updates.delta_KD) + updates.delta_KD
    starts = [as_numpy(order.params_D if one.start_D is None else one.start_D) for one in work]
    return asarray_like(np.stack(starts), updates.delta_KD) + updates.delta_KD


def _compare(
    trainer: Trainer, rule: LocalRule, order: Request, work: Sequence[ClientWork]
) -> tuple[dict[str, Any], list[str]]:
    """The loss of each received model that is compared, and the name of the best for each client.

    A pass with a learning rate of zero sees every example once and leaves the model as it is.
    """
    still = replace(order.local, learning_rate=0.0, epochs=1, steps=None, example_dp=None)
    found = {}
    for name in rule.evaluate_models:
        there = [_beginning(rule, trainer.layout, order, one, name) for one in work]
        found[f"loss/{name}"] = trainer.fit(replace(order, local=still), plain_training, there).metrics["loss"]
    if not found:
        return {}, [GLOBAL_MODEL] * len(work)
    loss_MK = np.stack([one.total_K / one.count_K for one in found.values()])
    return found, [rule.evaluate_models[m] for m in np.argmin(np.nan_to_num(loss_MK, nan=np.inf), axis=0)]


def _in_parts(trainer: Trainer, rule: LocalRule, order: Request, work: Sequence[ClientWork]) -> Updates:
    """First what stays, with the rest held fast; then the rest, with what stays held fast."""
    kept_D = np.zeros(trainer.layout.num_parameters, np.float32)
    kept_D[trainer.layout.positions(rule.personal_parameters)] = 1
    rest_D = 1 - kept_D
    for moves_D in (kept_D, rest_D):  # batches move statistics in both parts
        moves_D[trainer.layout.positions(trainer.layout.buffers)] = 1
    passes = replace(order.local, epochs=rule.personal_epochs, steps=None)
    first = trainer.fit(_moving(replace(order, local=passes), kept_D), _held(rule), work)
    # weight decay would move what is held fast
    first = replace(first, delta_KD=first.delta_KD * asarray_like(kept_D, first.delta_KD))
    ends_KD = as_numpy(_ends(order, work, first))
    work = [one._replace(start_D=ends_KD[k]) for k, one in enumerate(work)]
    then = trainer.fit(_moving(order, rest_D), _held(rule), work)
    return replace(then, delta_KD=first.delta_KD + then.delta_KD * asarray_like(rest_D, then.delta_KD))


def _moving(order: Request, moves_D: np.ndarray) -> Request:
    return replace(order, broadcast={**order.broadcast, "moves": moves_D})


@lru_cache(maxsize=64)  # the same rule from round to round: compiled programs and workers are kept by it
def _held(rule: LocalRule) -> LocalRule:
    """The rule, for the parameters that ``moves`` is one for."""

    def correct(grad: Any, w: Any, w_global: Any, moves: Any, **vectors: Any) -> Any:
        return moves * rule.correct(grad, w, w_global, **vectors)

    return rule._replace(correct=correct, receives=(*rule.receives, "moves"))


def _train_personal(
    trainer: Trainer, rule: LocalRule, order: Request, work: Sequence[ClientWork], updates: Updates
) -> Array:
    """The personal models after this round. None of them leaves, so that they are trained without noise."""
    personal = rule.personal
    assert personal is not None
    if personal.correct is None:
        return _ends(order, work, updates)
    own_KD = np.stack([as_numpy(one.client_state[PERSONAL_MODEL]) for one in work])
    start_KD = personal.start(own_KD, as_numpy(order.params_D))
    there = [one._replace(start_D=start_KD[k]) for k, one in enumerate(work)]
    order = replace(order, local=replace(order.local, example_dp=None))
    delta_KD = trainer.fit(order, _alone(rule), there).delta_KD
    return personal.after_training(asarray_like(own_KD, delta_KD), delta_KD)


@lru_cache(maxsize=64)
def _alone(rule: LocalRule) -> LocalRule:
    """The rule of the personal model's own training."""
    assert rule.personal is not None
    assert rule.personal.correct is not None
    return LocalRule(correct=rule.personal.correct, adjust_logits=rule.adjust_logits)
