"""What happens at a client: the same function in every engine and on a real node.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.server_optimizers import zeros
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context, Stage
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Array, ClientId, ClientWork, Examples, Failure, FailureStage, Request, State, Updates
from fedlearn.loop.local_training import initial_rule_state, train, train_mixed_rounds
from fedlearn.loop.protocols import Trainer


def initial_client_state(strategy: Strategy, layout: Layout, params_D: Array) -> State:
    """Return the state of a client before its first round: the part of the local rule and those of the stages."""
    memory = initial_rule_state(strategy.local, layout, params_D)
    for i, stage in enumerate(strategy.stages):
        memory |= {
            f"{i}.{name}": np.asarray(v) for name, v in stage.client.init(strategy.shared_layout(layout)).items()
        }
    return memory


def update_size_and_dtype(strategy: Strategy, request: Request, layout: Layout) -> tuple[int, np.dtype]:
    """How many numbers each client's update has when it leaves, for a stage may add some, and of which dtype."""
    blank = Updates(
        clients_K=np.zeros(1, np.int64),
        delta_KD=zeros(strategy.shared_layout(layout))[None],
        num_examples_K=np.ones(1, np.int64),
        num_steps_K=np.ones(1, np.int64),
    )
    memory_KD = stack_client_states([initial_client_state(strategy, layout, request.params_D)])
    for i, stage in enumerate(strategy.stages):
        blank = _leave_through(stage, i, request, blank, memory_KD)
    return int(blank.delta_KD.shape[1]), as_numpy(blank.delta_KD).dtype


def client_step(
    trainer: Trainer, strategy: Strategy, request: Request, work: Sequence[ClientWork]
) -> tuple[Updates, list[Failure]]:
    """Train K clients, refuse what is not finite, apply the client halves of the stages.

    Returns the updates of the clients that succeeded and a failure for each of the others.
    """
    return _after_training(trainer, strategy, request, work, train(trainer, strategy.local, request, work))


def client_step_mixed_rounds(
    trainer: Trainer, strategy: Strategy, requests: Sequence[Request], work: Sequence[ClientWork]
) -> list[Updates | Failure]:
    """Train K clients, each with a request of its own, as one block; return one result for each client.

    The local rule must satisfy `LocalRule.supports_mixed_rounds`.
    """
    trained, results = train_mixed_rounds(trainer, strategy.local, requests, work), []
    for k, (order, one) in enumerate(zip(requests, work, strict=True)):
        updates, failures = _after_training(trainer, strategy, order, [one], trained.rows(np.array([k])))
        results.append(updates if len(updates) else failures[0])
    return results


def _after_training(
    trainer: Trainer, strategy: Strategy, order: Request, work: Sequence[ClientWork], updates: Updates
) -> tuple[Updates, list[Failure]]:
    if tuple(updates.delta_KD.shape) != (len(work), trainer.layout.num_parameters):
        raise ValueError(f"updates have shape {tuple(updates.delta_KD.shape)}, not those of {len(work)} such models")
    updates, failures = refuse_non_finite(updates, work)
    if not len(updates):
        return updates, failures
    kept = set(updates.clients_K.tolist())
    memory_KD = stack_client_states([one.client_state for one in work if one.client in kept])
    updates = _finish(strategy, order, updates, memory_KD)
    updates = replace(updates, delta_KD=drop_personal_parameters(strategy, trainer.layout, updates.delta_KD))
    for i, stage in enumerate(strategy.stages):
        updates = _leave_through(stage, i, order, updates, memory_KD)
        updates = _written(stage, i, order, updates, memory_KD, strategy.shared_layout(trainer.layout))
    if strategy.privacy_guarantee is not None:
        updates = _withholding(updates, strategy.privacy_guarantee.withheld)
    return replace(updates, num_bytes_K=_bytes_of(updates)), failures


def drop_personal_parameters(strategy: Strategy, layout: Layout, delta_KD: Array) -> Array:
    """Updates without the parameters that stay at the clients."""
    if not strategy.local.personal_parameters:
        return delta_KD
    sent = np.delete(np.arange(layout.num_parameters), layout.positions(strategy.local.personal_parameters))
    return delta_KD[:, sent]


def refuse_non_finite(updates: Updates, work: Sequence[ClientWork]) -> tuple[Updates, list[Failure]]:
    """Drop the clients whose update or own model is not finite, with the reason as far as their data tell it."""
    finite_K = np.all([_finite(rows_KD) for rows_KD in (updates.delta_KD, *updates.client_state.values())], axis=0)
    if finite_K.all():
        return updates, []
    bad = set(updates.clients_K[~finite_K].tolist())
    failures = [
        Failure(client=one.client, stage=FailureStage.UPDATE, reason=_why_not_finite(one.examples))
        for one in work
        if one.client in bad
    ]
    return updates.rows(finite_K), failures


def _finite(rows_KD: Array) -> np.ndarray:
    xp = array_namespace(rows_KD)
    with np.errstate(over="ignore", invalid="ignore"):
        finite_K = as_numpy(xp.isfinite(xp.sum(rows_KD, axis=-1)))
    if finite_K.all():
        return finite_K
    return as_numpy(xp.all(xp.isfinite(rows_KD), axis=-1))  # sums may overflow though all they add is finite


def _why_not_finite(examples: Examples) -> str:
    for name, array in (("x", examples.x), ("y", examples.y)):
        numbers_NF = np.asarray(array, np.float64).reshape(len(array), -1)
        bad_N = np.any(~np.isfinite(numbers_NF), axis=1)
        if bad_N.any():
            first = int(np.argmax(bad_N))
            count = f"{bad_N.sum()} of {len(bad_N)}"
            return f"the update is not finite: {count} examples hold NaN or infinity in {name}, first {first}"
    return "the update is not finite though the data are: training diverged; try a smaller local.learning_rate"


def stack_client_states(client_states: Sequence[State]) -> Mapping[str, np.ndarray]:
    """The memories of K clients as K x D arrays."""
    return {name: np.stack([as_numpy(memory[name]) for memory in client_states]) for name in client_states[0]}


def _finish(strategy: Strategy, order: Request, updates: Updates, memory_KD: Mapping[str, Array]) -> Updates:
    """Let the local rule say what each client remembers and what else it sends."""
    rule = strategy.local
    vectors = {name: memory_KD[name] for name in rule.client_state} | {
        name: order.broadcast[name] for name in rule.receives
    }
    vectors = {name: asarray_like(v, updates.delta_KD) for name, v in vectors.items()}
    delta_KD = updates.delta_KD
    steps_K = array_namespace(delta_KD).asarray(updates.num_steps_K, dtype=delta_KD.dtype, device=delta_KD.device)
    kept, extra = rule.after_training(delta_KD, steps_K, order.local.learning_rate, **vectors)
    return replace(updates, client_state={**updates.client_state, **kept}, extra=dict(extra))


def _leave_through(
    stage: Stage, number: int, order: Request, updates: Updates, memory_KD: Mapping[str, Array]
) -> Updates:
    """Apply one stage's client half to the whole block."""
    prefix, sent = f"{number}.", f"stage/{number}/"
    memory_KD = {name: asarray_like(v, updates.delta_KD) for name, v in memory_KD.items() if name.startswith(prefix)}
    own = {name.removeprefix(prefix): v for name, v in memory_KD.items()}
    broadcast = {name.removeprefix(sent): v for name, v in order.broadcast.items() if name.startswith(sent)}
    context = Context(
        round=order.round,
        seed=order.seed,
        clients_K=updates.clients_K,
        broadcast=broadcast,
        deployed=order.deployed,
    )
    delta_KD, kept = stage.client.update(updates.delta_KD, own, context)
    memory = {**updates.client_state, **{f"{prefix}{name}": v for name, v in kept.items()}}
    return replace(updates, delta_KD=delta_KD, client_state=memory)


def _written(
    stage: Stage, number: int, order: Request, updates: Updates, memory_KD: Mapping[str, Array], layout: Layout
) -> Updates:
    """Write each client's update with the stage's codec, and go on with what a reader makes of it."""
    if stage.codec is None:
        return updates
    name = f"{number}.error"
    whole_KD = as_numpy(updates.delta_KD) + memory_KD.get(name, 0)
    clients = updates.clients_K.tolist()
    if whole_KD.shape[1:] != (layout.num_parameters,):
        raise ValueError(f"a codec writes the {layout.num_parameters} numbers of an update, not {whole_KD.shape[1]}")
    written = [
        stage.codec.encode(row_D, layout, codec_rng(order, client))
        for row_D, client in zip(whole_KD, clients, strict=True)
    ]
    read_KD = np.stack(
        [
            stage.codec.decode(payload, layout, codec_rng(order, client))
            for payload, client in zip(written, clients, strict=True)
        ]
    )
    memory = {**updates.client_state, name: whole_KD - read_KD} if name in memory_KD else updates.client_state
    return replace(
        updates, delta_KD=asarray_like(read_KD, updates.delta_KD), client_state=memory, payloads=tuple(written)
    )


def codec_rng(request: Request, client: ClientId) -> np.random.Generator:
    """The random numbers that writer and reader of an update share."""
    return generator(request.seed, Purpose.COMPRESS, round=request.round, client=client)


def _withholding(updates: Updates, what: frozenset[str]) -> Updates:
    """Without what no noise covers; each client then counts as one example, so that no weight tells how many it has."""
    examples_K = np.ones_like(updates.num_examples_K) if "examples" in what else updates.num_examples_K
    return replace(updates, metrics={} if "metrics" in what else updates.metrics, num_examples_K=examples_K)


def _bytes_of(updates: Updates) -> np.ndarray:
    """Payload of each client: its update and what else it sends."""
    vectors = [*updates.extra.values()] if updates.payloads else [updates.delta_KD, *updates.extra.values()]
    same = sum(v.dtype.itemsize * int(np.prod(v.shape[1:])) for v in vectors)
    return same + np.array([len(payload) for payload in updates.payloads] or [0] * len(updates), np.int64)
