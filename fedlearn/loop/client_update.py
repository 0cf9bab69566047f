"""Compute the updates of clients: local training, checks, and the client halves of the stages.

Every engine and every real node uses these functions.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.algorithm.server_optimizers import zeros
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context, Stage
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.inputs import input_arrays
from fedlearn.core.layout import Layout
from fedlearn.core.named_option import option_name, option_values
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Array, ClientId, ClientWork, Examples, Failure, FailureStage, Request, State, Updates
from fedlearn.core.schedules import rate_factors
from fedlearn.loop.local_training import initial_rule_state, train, train_mixed_rounds
from fedlearn.loop.protocols import Trainer


def initial_client_state(strategy: Strategy, layout: Layout, params_D: Array) -> State:
    """Return the client state before the first round: the values of the local rule and of each stage."""
    client_state = initial_rule_state(strategy.local, layout, params_D)
    for i, stage in enumerate(strategy.stages):
        stage_state = stage.client.init(strategy.shared_layout(layout))
        client_state |= {f"{i}.{name}": np.asarray(v) for name, v in stage_state.items()}
    return client_state


def update_size_and_dtype(strategy: Strategy, request: Request, layout: Layout) -> tuple[int, np.dtype]:
    """Return the number of values in an update that a client sends, and their dtype. A stage can change both."""
    blank = Updates(
        clients_K=np.zeros(1, np.int64),
        delta_KD=zeros(strategy.shared_layout(layout))[None],
        num_examples_K=np.ones(1, np.int64),
        num_steps_K=np.ones(1, np.int64),
    )
    state_KD = stack_client_states([initial_client_state(strategy, layout, request.params_D)])
    for i, stage in enumerate(strategy.stages):
        blank = _apply_stage(stage, i, request, blank, state_KD)
    return int(blank.delta_KD.shape[1]), as_numpy(blank.delta_KD).dtype


def client_step(
    trainer: Trainer, strategy: Strategy, request: Request, work: Sequence[ClientWork]
) -> tuple[Updates, list[Failure]]:
    """Train K clients, refuse updates that are not finite, and apply the client halves of the stages.

    Args:
        trainer: trains the clients.
        strategy: local rule and stages.
        request: the request to the cohort.
        work: the K clients, with examples and client states.

    Returns:
        The updates of the clients that succeeded, and a failure for each of the others.
    """
    return _after_training(trainer, strategy, request, work, train(trainer, strategy.local, request, work))


def client_step_mixed_rounds(
    trainer: Trainer, strategy: Strategy, requests: Sequence[Request], work: Sequence[ClientWork]
) -> list[Updates | Failure]:
    """Train K clients, each with a different request, as one block. Return one result for each client.

    The local rule must satisfy `LocalRule.supports_mixed_rounds`.
    """
    trained, results = train_mixed_rounds(trainer, strategy.local, requests, work), []
    for k, (request, client_work) in enumerate(zip(requests, work, strict=True)):
        updates, failures = _after_training(trainer, strategy, request, [client_work], trained.rows(np.array([k])))
        results.append(updates if len(updates) else failures[0])
    return results


def _after_training(
    trainer: Trainer, strategy: Strategy, request: Request, work: Sequence[ClientWork], updates: Updates
) -> tuple[Updates, list[Failure]]:
    """Check the updates of the trainer, and apply local rule, stages, codecs and privacy.

    Raises:
        ValueError: The trainer returns updates of a wrong shape.
    """
    shape, expected = tuple(updates.delta_KD.shape), (len(work), trainer.layout.num_parameters)
    if shape != expected:
        raise ValueError(f"the trainer returned updates of shape {shape}, expected {expected} (clients, parameters)")
    updates, failures = refuse_non_finite(updates, work)
    if not len(updates):
        return updates, failures
    valid = set(updates.clients_K.tolist())
    state_KD = stack_client_states([client_work.client_state for client_work in work if client_work.client in valid])
    updates = _apply_rule(strategy, request, updates, state_KD, trainer.layout)
    updates = replace(updates, delta_KD=drop_unshared_parameters(strategy, trainer.layout, updates.delta_KD))
    for i, stage in enumerate(strategy.stages):
        updates = _apply_stage(stage, i, request, updates, state_KD)
        updates = _compress(stage, i, request, updates, state_KD, strategy.shared_layout(trainer.layout))
    if strategy.privacy_guarantee is not None:
        updates = _withhold(updates, strategy.privacy_guarantee.withheld)
    return replace(updates, num_bytes_K=_num_bytes(updates)), failures


def drop_unshared_parameters(strategy: Strategy, layout: Layout, delta_KD: Array) -> Array:
    """Return updates without personal and frozen parameters."""
    if not strategy.local.unshared_parameters:
        return delta_KD
    return delta_KD[:, strategy.shared_positions(layout)]


def refuse_non_finite(updates: Updates, work: Sequence[ClientWork]) -> tuple[Updates, list[Failure]]:
    """Drop clients whose update or client state is not finite. Return the other updates, and the failures.

    The failure names NaN or infinity in the examples of the client, if there are any.
    """
    finite_K = np.all([_finite(rows_KD) for rows_KD in (updates.delta_KD, *updates.client_state.values())], axis=0)
    if finite_K.all():
        return updates, []
    bad = set(updates.clients_K[~finite_K].tolist())
    failures = [
        Failure(client=item.client, stage=FailureStage.UPDATE, reason=_non_finite_reason(item.examples))
        for item in work
        if item.client in bad
    ]
    return updates.rows(finite_K), failures


def _finite(rows_KD: Array) -> np.ndarray:
    """Return for each row whether all its values are finite, ``(K,)``."""
    xp = array_namespace(rows_KD)
    with np.errstate(over="ignore", invalid="ignore"):
        finite_K = as_numpy(xp.isfinite(xp.sum(rows_KD, axis=-1)))
    if finite_K.all():
        return finite_K
    return as_numpy(xp.all(xp.isfinite(rows_KD), axis=-1))  # the sum of finite values may overflow


def _non_finite_reason(examples: Examples) -> str:
    for name, array in (*(("x", part) for part in input_arrays(examples.x)), ("y", examples.y)):
        numbers_NF = np.asarray(array, np.float64).reshape(len(array), -1)
        bad_N = np.any(~np.isfinite(numbers_NF), axis=1)
        if bad_N.any():
            first = int(np.argmax(bad_N))
            count = f"{bad_N.sum()} of {len(bad_N)}"
            return f"the update is not finite: {count} examples have NaN or infinity in {name}, first {first}"
    return "the update is not finite, but the data are finite: training diverged. Try a smaller local.learning_rate"


def stack_client_states(client_states: Sequence[State]) -> Mapping[str, np.ndarray]:
    """Return the states of K clients as one array ``(K, ...)`` per name."""
    return {name: np.stack([as_numpy(state[name]) for state in client_states]) for name in client_states[0]}


def _apply_rule(
    strategy: Strategy, request: Request, updates: Updates, state_KD: Mapping[str, Array], layout: Layout
) -> Updates:
    """Add the new client states and the extra values of the local rule, and change the sent updates."""
    rule = strategy.local
    vectors = {name: state_KD[name] for name in rule.client_state}
    vectors |= {name: request.broadcast[name] for name in rule.receives}
    vectors = {name: asarray_like(v, updates.delta_KD) for name, v in vectors.items()}
    delta_KD = updates.delta_KD
    steps_K = array_namespace(delta_KD).asarray(updates.num_steps_K, dtype=delta_KD.dtype, device=delta_KD.device)
    new_state, extra = rule.after_training(delta_KD, steps_K, round_rate(request), **vectors)
    updates = replace(updates, client_state={**updates.client_state, **new_state}, extra={**updates.extra, **extra})
    return updates if rule.send is None else replace(updates, delta_KD=_sent(rule, delta_KD, new_state, layout))


def _sent(rule: LocalRule, delta_KD: Array, state_KD: State, layout: Layout) -> Array:
    """Return the updates that clients send. A local rule does not change buffers."""
    assert rule.send is not None
    sent_KD = rule.send(delta_KD, **state_KD)
    if not layout.buffers:
        return sent_KD
    is_buffer_D = np.zeros(layout.num_parameters, bool)
    is_buffer_D[layout.positions(layout.buffers)] = True
    return array_namespace(delta_KD).where(asarray_like(is_buffer_D, delta_KD), delta_KD, sent_KD)


def round_rate(request: Request) -> float:
    """Return the learning rate of a round. For a schedule over the steps, it is the rate of the settings."""
    local = request.local
    over = option_values(local.schedule).get("over", "rounds")
    if local.schedule == "constant" or option_name(local.schedule) is None or over != "rounds":
        return local.learning_rate
    return local.learning_rate * float(rate_factors(local.schedule, request.round, 1)[0])


def _apply_stage(
    stage: Stage, number: int, request: Request, updates: Updates, state_KD: Mapping[str, Array]
) -> Updates:
    """Apply the client half of one stage to the whole block."""
    prefix, sent = f"{number}.", f"stage/{number}/"
    state_KD = {name: asarray_like(v, updates.delta_KD) for name, v in state_KD.items() if name.startswith(prefix)}
    stage_state = {name.removeprefix(prefix): v for name, v in state_KD.items()}
    broadcast = {name.removeprefix(sent): v for name, v in request.broadcast.items() if name.startswith(sent)}
    context = Context(
        round=request.round,
        seed=request.seed,
        clients_K=updates.clients_K,
        broadcast=broadcast,
        deployed=request.deployed,
    )
    delta_KD, new_state = stage.client.update(updates.delta_KD, stage_state, context)
    client_state = {**updates.client_state, **{f"{prefix}{name}": v for name, v in new_state.items()}}
    return replace(updates, delta_KD=delta_KD, client_state=client_state)


def _compress(
    stage: Stage, number: int, request: Request, updates: Updates, state_KD: Mapping[str, Array], layout: Layout
) -> Updates:
    """Encode each update with the codec of the stage, and replace it by its decoded value.

    The server sees only the decoded value. With error feedback, the encoding error stays at the client as its residual.

    Raises:
        ValueError: An update has another number of parameters than the codec encodes.
    """
    if stage.codec is None:
        return updates
    name = f"{number}.error"
    input_KD = as_numpy(updates.delta_KD) + state_KD.get(name, 0)
    rng_of = partial(codec_rng, request)
    clients = updates.clients_K.tolist()
    if input_KD.shape[1:] != (layout.num_parameters,):
        num_values = input_KD.shape[1]
        raise ValueError(
            f"the update has {num_values} values, but the codec encodes {layout.num_parameters} parameters"
        )
    rows = zip(input_KD, clients, strict=True)
    payloads = [stage.codec.encode(row_D, layout, rng_of(client)) for row_D, client in rows]
    pairs = zip(payloads, clients, strict=True)
    decoded_KD = np.stack([stage.codec.decode(payload, layout, rng_of(client)) for payload, client in pairs])
    client_state = updates.client_state
    if name in state_KD:
        client_state = {**client_state, name: input_KD - decoded_KD}
    delta_KD = asarray_like(decoded_KD, updates.delta_KD)
    return replace(updates, delta_KD=delta_KD, client_state=client_state, payloads=tuple(payloads))


def codec_rng(request: Request, client: ClientId) -> np.random.Generator:
    """Return the generator that the encoder and the decoder of an update share."""
    return generator(request.seed, Purpose.COMPRESS, round=request.round, client=client)


def _withhold(updates: Updates, withheld: frozenset[str]) -> Updates:
    """Remove the values that no noise protects.

    Without example counts, each client counts as one example with one step. So no weight and no number of steps
    reveals the number of its examples.
    """
    if "examples" in withheld:
        ones_K = np.ones_like(updates.num_examples_K)
        updates = replace(updates, num_examples_K=ones_K, num_steps_K=np.ones_like(updates.num_steps_K))
    return replace(updates, metrics={} if "metrics" in withheld else updates.metrics)


def _num_bytes(updates: Updates) -> np.ndarray:
    """Return the number of bytes that each client sends: its update and its extra values, ``(K,)``."""
    vectors = [*updates.extra.values()] if updates.payloads else [updates.delta_KD, *updates.extra.values()]
    same = sum(v.dtype.itemsize * int(np.prod(v.shape[1:])) for v in vectors)
    return same + np.array([len(payload) for payload in updates.payloads] or [0] * len(updates), np.int64)
