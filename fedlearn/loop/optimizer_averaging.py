"""Average the optimizer states of clients at the server, for ``local.optimizer_state=average``.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule, with_optimizer_state
from fedlearn.algorithm.strategy import Strategy, averaged_names
from fedlearn.algorithm.transforms import Context, Transform
from fedlearn.core.arrays import as_numpy
from fedlearn.core.optimizers import STEPS
from fedlearn.core.records import Array, ClientWork, LocalSettings, Request, State, Updates
from fedlearn.errors import require


def with_kept_optimizer(strategy: Strategy, local: LocalSettings) -> Strategy:
    """Return the strategy for clients that keep the state of the optimizer, or send it to the server to average it.

    Raises:
        SettingError: The strategy does not support the setting ``optimizer_state``.
    """
    rule = with_optimizer_state(strategy.local, local)
    if not rule.averages_optimizer:
        return replace(strategy, local=rule)
    setting, value = "local.optimizer_state", local.optimizer_state
    expected = "reset or keep: an asynchronous strategy has no states of one round to average"
    require(strategy.asynchrony is None, setting, value, expected, f"{setting}=keep")
    is_new = not strategy.local.averages_optimizer
    return replace(strategy, local=rule, server=_averaging(strategy.server, rule) if is_new else strategy.server)


def refuse_with_privacy(rule: LocalRule, kind: str) -> None:
    """Refuse averaged optimizer states with a privacy mechanism that adds no noise to them.

    With DP-SGD, the states follow from private gradients.

    Raises:
        SettingError: The mechanism is another one than ``example``.
    """
    is_safe = not rule.averages_optimizer or kind in ("none", "example")
    expected = f"reset or keep: privacy={kind} protects updates, but not the optimizer states that clients would send"
    require(is_safe, "local.optimizer_state", "average", expected, "local.optimizer_state=keep")


def _averaging(server: Transform, rule: LocalRule) -> Transform:
    """Return the server optimizer, which also keeps the mean of the optimizer states and sends it to clients."""
    names = averaged_names(rule)

    def server_state(state: State) -> dict[str, Any]:
        return {name: value for name, value in state.items() if name not in names}

    def update(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        step_D, new_state = server.update(update_D, server_state(state), context)
        return step_D, {**new_state, **{name: np.asarray(as_numpy(context.extra[name])) for name in names}}

    def broadcast(state: State) -> Mapping[str, Array]:
        return {**server.broadcast(server_state(state)), **{name: state[name] for name in names if name in state}}

    return server._replace(update=update, broadcast=broadcast)


def receive_states(rule: LocalRule, request: Request, work: Sequence[ClientWork]) -> list[ClientWork]:
    """Return the work of clients that start with the optimizer state of the server.

    In the first round, there is none, and clients start with a new state.
    """
    received = {name: as_numpy(request.broadcast[name]) for name in averaged_names(rule) if name in request.broadcast}
    if STEPS in received:  # the number of steps is sent as a vector, like all values beside an update
        received[STEPS] = np.rint(received[STEPS][:1])
    return [item._replace(client_state={**item.client_state, **received}) for item in work]


def send_states(rule: LocalRule, updates: Updates) -> Updates:
    """Return updates that send the optimizer states instead of keeping them at the clients."""
    kept = dict(updates.client_state)
    states = {name: as_numpy(kept.pop(name)) for name in (*rule.optimizer_state, STEPS)}
    states[STEPS] = np.repeat(states[STEPS], updates.delta_KD.shape[1], axis=1)
    extra = {name: states[name].astype(np.float32) for name in averaged_names(rule)}
    return replace(updates, client_state=kept, extra={**updates.extra, **extra})
