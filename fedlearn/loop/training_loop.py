"""The federated round, as a generator: everything else looks on.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.aggregation import PartialAggregate, accumulate, divide_total
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.layout import RUNNING_VARIANCE, Layout
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientId,
    Evaluation,
    Failure,
    LocalSettings,
    Predictions,
    Request,
    Round,
    ServerState,
    State,
    sorted_client_ids,
)
from fedlearn.errors import FedlearnError, TooManyFailures, is_count, is_number, require
from fedlearn.loop.async_loop import accumulate_buffer, fill_buffer
from fedlearn.loop.base_engine import require_engine
from fedlearn.loop.protocols import AsyncEngine, Engine
from fedlearn.loop.system_model import SystemModel
from fedlearn.loop.virtual_clock import VirtualClockEngine

# of the global model (None where each client uses its own), from clients' outputs: none where nobody holds anything
# out; and then None where there is nothing else to judge it by
Evaluate = Callable[[Array | None, Sequence[Predictions] | Sequence[ClientEvaluation]], Evaluation | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Set the number of rounds, the rounds that evaluate, and the tolerated failures.

    Args:
        rounds: in all, counted from the first, >= 1.
        evaluate_every: evaluate each n-th round and the last, >= 1.
        evaluate_clients: how many clients to evaluate at most; more are drawn once per run.
        max_failures: share of a cohort that may fail, in [0, 1); a round with no update at all always stops.
    """

    rounds: int
    evaluate_every: int = 1
    evaluate_clients: int = 1000
    max_failures: float = 0.3

    def __post_init__(self) -> None:
        require(is_count(self.rounds), "rounds", self.rounds, "a whole number >= 1", "rounds=20")
        every, most, share = self.evaluate_every, self.evaluate_clients, self.max_failures
        require(is_count(every), "evaluate_every", every, "a whole number >= 1", "evaluate_every=1")
        require(is_count(most), "evaluate_clients", most, "a whole number >= 1", "evaluate_clients=1000")
        require(is_number(share, at_least=0, below=1), "max_failures", share, "a share in [0, 1)", "max_failures=0.3")

    def is_evaluation_round(self, round: int) -> bool:
        """Whether this round is evaluated."""
        return round % self.evaluate_every == 0 or round == self.rounds


def start(strategy: Strategy, params_D: Array, engine: Engine, *, seed: int) -> ServerState:
    """Return the server state before the first round."""
    return initial_server_state(strategy, params_D, engine.layout, seed=seed)


def initial_server_state(strategy: Strategy, params_D: Array, layout: Layout, *, seed: int) -> ServerState:
    """The same, where there is no engine."""
    stages = tuple(stage.server.init(strategy.shared_layout(layout)) for stage in strategy.stages)
    server, select, protection = strategy.server.init(layout), strategy.select.initial_state, strategy.privacy_guarantee
    ledger = Ledger() if protection is None else protection.initial_ledger
    return ServerState(
        round=0,
        seed=seed,
        params_D=params_D,
        server=server,
        stages=stages,
        aggregate=strategy.aggregate.init_state(strategy.shared_layout(layout)),
        select=select,
        ledger=ledger,
    )


def federate(
    strategy: Strategy,
    engine: Engine,
    state: ServerState,
    *,
    schedule: Schedule,
    local: LocalSettings | None = None,
    evaluate: Evaluate | None = None,
) -> Generator[Round, None, str | None]:
    """Run rounds ``state.round + 1`` to ``schedule.rounds``, yielding each.

    Stop by breaking out; go on later by passing the last round's state (and the engine's memories). A round depends
    on nothing else, so that a resumed run ends where an uninterrupted one does, bit for bit. Before a round that would
    overspend the strategy's privacy budget it ends, and all that was yielded stands.

    Of an asynchronous strategy a round is one step of the server. It needs a clock: an engine without one gets that of
    `fedlearn.loop.system_model.none`, on which every order takes a second.

    Args:
        strategy: the algorithm.
        engine: who carries it out.
        state: from `start`, or from a checkpoint.
        schedule: rounds, evaluation, failures.
        local: how clients train.
        evaluate: from what the engine brings of clients' held-out parts to an `Evaluation`; None never evaluates.

    Returns:
        Why it ended before ``schedule.rounds`` (the value of ``StopIteration``), or None.

    Raises:
        TooManyFailures: if more of a cohort fails than ``schedule.max_failures``; the last yielded state stands.
    """
    local = local or LocalSettings()
    require_engine(engine)
    if strategy.asynchrony is not None and not isinstance(engine, AsyncEngine):
        engine = VirtualClockEngine(engine, SystemModel())
    while state.round < schedule.rounds:
        began = time.perf_counter()
        if strategy.asynchrony is not None:
            done = run_async_step(strategy, engine, state, schedule=schedule, local=local)
        else:
            cohort = _cohort(strategy, engine, state)
            refusal = strategy.privacy_guarantee and strategy.privacy_guarantee.refusal_reason(
                state.ledger, Release(round=state.round + 1, clients=cohort)
            )
            if refusal:
                return refusal
            done = run_round(strategy, engine, state, cohort, schedule=schedule, local=local)
        state = done.state
        if evaluate is not None and schedule.is_evaluation_round(state.round):
            evaluation, failures = evaluate_round(strategy, engine, state, schedule, evaluate)
            done = replace(done, evaluation=evaluation, failures=done.failures + failures)
        yield replace(done, seconds=time.perf_counter() - began)
    return None


def _cohort(strategy: Strategy, engine: Engine, state: ServerState) -> tuple[ClientId, ...]:
    number = state.round + 1
    rng = generator(state.seed, Purpose.SELECT, round=number)
    if (
        engine.deployed and strategy.privacy_guarantee is not None
    ):  # who takes part must not follow from a run's settings
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(32), "big")))
    return sorted_client_ids(strategy.select.choose(number, engine.clients, rng, **state.select))


def run_round(
    strategy: Strategy,
    engine: Engine,
    state: ServerState,
    cohort: tuple[ClientId, ...],
    *,
    schedule: Schedule,
    local: LocalSettings,
) -> Round:
    """One round: train, aggregate, step, charge."""
    order = _order(strategy, engine, state, local)
    gathered = _gather(strategy, engine, order, cohort)
    if cohort or not (strategy.privacy_guarantee and strategy.privacy_guarantee.supports_empty_rounds):
        _stop_if_too_many_failed(gathered, len(cohort), schedule.max_failures)
    done = _concluded(strategy, engine, state, order, gathered, cohort)
    if engine.elapsed_s is None:
        return done
    clock = state.clock + engine.elapsed_s
    return replace(done, state=replace(done.state, clock=clock), clock=clock)


def run_async_step(
    strategy: Strategy, engine: Engine, state: ServerState, *, schedule: Schedule, local: LocalSettings
) -> Round:
    """One step of an asynchronous strategy: wait for updates, however old, aggregate, step."""
    assert isinstance(engine, AsyncEngine)
    order = _order(strategy, engine, state, local)
    under_way = [
        replace(one, request=replace(one.request, local=local, deployed=engine.deployed)) for one in state.in_flight
    ]  # a checkpoint does not repeat what the settings say
    buffer = fill_buffer(strategy, engine, engine.clients, under_way, order)
    fold = strategy.aggregate.init(strategy.shared_layout(engine.layout))
    gathered = accumulate_buffer(PartialAggregate(aggregator_state=fold), strategy, buffer, order.round)
    _stop_if_too_many_failed(gathered, len(buffer.completed) + len(buffer.in_flight), schedule.max_failures)
    stale = {"staleness_K": buffer.staleness(order.round), "sent_D": buffer.mean_sent_params()}
    done = _concluded(strategy, engine, state, order, gathered, buffer.cohort, num_sent=buffer.num_sent, **stale)
    return replace(done, state=replace(done.state, clock=buffer.clock, in_flight=buffer.in_flight), clock=buffer.clock)


def _order(strategy: Strategy, engine: Engine, state: ServerState, local: LocalSettings) -> Request:
    return Request(
        round=state.round + 1,
        seed=state.seed,
        params_D=state.params_D,
        broadcast=_broadcast(strategy, state),
        local=local,
        deployed=engine.deployed,
        clock=state.clock,
    )


def _concluded(
    strategy: Strategy,
    engine: Engine,
    state: ServerState,
    order: Request,
    gathered: PartialAggregate,
    cohort: tuple[ClientId, ...],
    *,
    num_sent: int | None = None,
    **known: Any,
) -> Round:
    """The server's half of a round: aggregate, step, charge. ``num_sent`` orders went out; None: one to each client."""
    number, protection = order.round, strategy.privacy_guarantee
    context = Context(
        round=number,
        seed=state.seed,
        clients_K=np.array(gathered.clients, np.int64),
        num_examples_K=np.array(gathered.num_examples_per_client, np.int64),
        metrics={name: np.array(values) for name, values in gathered.metrics_per_client.items()},
        num_clients=len(engine.clients),
        cohort_size=len(cohort),
        extra={name: divide_total(total, gathered.num_updates) for name, total in gathered.extra.items()},
        params_D=state.params_D,
        layout=strategy.shared_layout(engine.layout),
        deployed=engine.deployed,
        **known,
    )
    update_D, aggregate = strategy.aggregate.finish(gathered.aggregator_state, state.aggregate, context)
    params_D, server, stages = server_step(strategy, state, update_D, context, engine.layout)
    learn = strategy.select.update
    select = learn(state.select, context) if learn else state.select
    ledger = state.ledger if protection is None else protection.charge(state.ledger, _release(number, gathered))
    withheld = protection is not None and "examples" in protection.withheld
    sent = engine.layout.num_parameters + sum(int(np.prod(v.shape)) for v in order.broadcast.values())
    return Round(
        state=replace(
            state,
            round=number,
            params_D=params_D,
            server=server,
            stages=stages,
            aggregate=aggregate,
            select=select,
            ledger=ledger,
        ),
        cohort=cohort,
        failures=gathered.failures,
        metrics={name: total / count for name, (total, count) in gathered.metrics.items() if count},
        num_examples=None if withheld else gathered.num_examples,
        privacy=None if protection is None else protection.epsilon_of(ledger),
        bytes_up=gathered.bytes_up,
        bytes_down=(len(cohort) if num_sent is None else num_sent) * 4 * sent,
    )


def _broadcast(strategy: Strategy, state: ServerState) -> dict[str, Array]:
    """Return the vectors of a request: those for the local rule, and those of stages for their client halves."""
    of_stages = (
        (f"stage/{i}/{name}", v)
        for i, stage in enumerate(strategy.stages)
        for name, v in stage.server.broadcast(state.stages[i]).items()
    )
    of_rule = strategy.aggregate.broadcast(state.aggregate)
    return {**strategy.server.broadcast(state.server), **of_rule, **dict(of_stages)}


def _release(number: int, gathered: PartialAggregate) -> Release:
    """What left the clients. One that failed before sending released nothing; a lost reply may have been read."""
    lost = {failure.client for failure in gathered.failures if not failure.stage.is_before_sending}
    sent, examples, steps = gathered.clients, gathered.num_examples_per_client, gathered.num_steps_per_client
    return Release(
        round=number, clients=sent, num_examples=examples, num_steps=steps, dropouts=tuple(sorted(lost - set(sent)))
    )


def _gather(strategy: Strategy, engine: Engine, order: Request, cohort: Sequence[ClientId]) -> PartialAggregate:
    gathered = PartialAggregate(aggregator_state=strategy.aggregate.init(strategy.shared_layout(engine.layout)))
    for result in engine.fit(order, strategy, cohort):
        gathered = accumulate(gathered, strategy.aggregate, result)
    return gathered


def _stop_if_too_many_failed(gathered: PartialAggregate, num_asked: int, max_failures: float) -> None:
    failures = [failure for failure in gathered.failures if failure.stage.counts_as_failure]
    failed = len({failure.client for failure in failures})
    if failed > floor(max_failures * num_asked) or not gathered.num_updates:
        first = failures[0] if failures else None
        why = f"; the first: client {first.client}, at stage {first.stage}: {first.reason}" if first else ""
        raise TooManyFailures(
            f"{failed} of {num_asked} clients failed, more than max_failures={max_failures} allows{why}",
            gathered.failures,
        )


def server_step(
    strategy: Strategy, state: ServerState, update_D: Array, context: Context, layout: Layout
) -> tuple[Array, State, tuple[State, ...]]:
    """The server's half: stages in reverse order, then the optimiser, then the step; what stays at clients stays."""
    stages = list(state.stages)
    for i in reversed(range(len(strategy.stages))):
        update_D, stages[i] = strategy.stages[i].server.update(update_D, stages[i], context)
    if strategy.local.personal_parameters:
        update_D = _filled_up(update_D, layout.positions(strategy.local.personal_parameters), layout.num_parameters)
    step_D, server = strategy.server.update(update_D, state.server, context)
    if strategy.buffers == "average":
        step_D = _averaged(step_D, update_D, layout)
    params_D = asarray_like(state.params_D, step_D) + step_D
    _refuse_negative_variances(params_D, layout)
    return params_D, server, tuple(stages)


def _averaged(step_D: Array, update_D: Array, layout: Layout) -> Array:
    """The server's step, which of buffers is the aggregate itself: they follow no gradient to be accelerated."""
    is_buffer_D = np.zeros(layout.num_parameters, bool)
    is_buffer_D[layout.positions(layout.buffers)] = True
    return array_namespace(step_D).where(asarray_like(is_buffer_D, step_D), asarray_like(update_D, step_D), step_D)


def _refuse_negative_variances(params_D: Array, layout: Layout) -> None:
    names = [name for name in layout.buffers if name.endswith(RUNNING_VARIANCE)]
    if names and (as_numpy(params_D)[layout.positions(tuple(names))] < 0).any():
        raise FedlearnError(
            "a running variance fell below zero: what this strategy makes of updates (or its compression leaves of "
            "them) is no weighted mean of the clients' statistics\n  try       buffers=local"
        )


def _filled_up(update_S: Array, kept: np.ndarray, size: int) -> Array:
    """An update of the parameters that are shared, with zeros for those that are not."""
    xp = array_namespace(update_S)
    source_D = np.full(size, update_S.shape[0])
    source_D[np.delete(np.arange(size), kept)] = np.arange(update_S.shape[0])
    padded = xp.concat([update_S, xp.zeros_like(update_S[:1])])
    return xp.take(padded, asarray_like(source_D, padded), axis=0)


def evaluate_round(
    strategy: Strategy, engine: Engine, state: ServerState, schedule: Schedule, evaluate: Evaluate
) -> tuple[Evaluation | None, tuple[Failure, ...]]:
    """Judge on clients' held-out parts the global model, if there is one, and the models of the clients' own."""
    rule, cohort = strategy.local, select_evaluation_clients(engine.clients, schedule, state.seed)
    if rule.personal_parameters:
        return _evaluated(engine.evaluate(state.params_D, cohort, strategy), None, evaluate)
    found, failures = _evaluated(engine.evaluate(state.params_D, cohort), state.params_D, evaluate)
    if not (found and rule.personal):
        return found, failures
    personal, more = _evaluated(engine.evaluate(state.params_D, cohort, strategy), None, evaluate)
    return replace(found, personal=personal), failures + more


def _evaluated(
    results: Iterable[Any], params_D: Array | None, evaluate: Evaluate
) -> tuple[Evaluation | None, tuple[Failure, ...]]:
    results = list(results)
    judged: list[Any] = [result for result in results if not isinstance(result, Failure)]
    failures = tuple(result for result in results if isinstance(result, Failure))
    return (evaluate(params_D, judged) if judged or params_D is not None else None), failures


def select_evaluation_clients(clients: Sequence[ClientId], schedule: Schedule, seed: int) -> Sequence[ClientId]:
    """Whose held-out parts are evaluated: all, or those drawn for the run."""
    if len(clients) <= schedule.evaluate_clients:
        return clients
    chosen = generator(seed, Purpose.EVALUATE).choice(len(clients), schedule.evaluate_clients, replace=False)
    return sorted_client_ids([clients[i] for i in chosen])
