"""Run federated rounds as a generator. Callbacks and commands consume the rounds.

Shapes: K clients in a block, D parameters, S parameters that clients share with the server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate, accumulate, divide_total
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import (
    Array,
    ClientId,
    LocalSettings,
    Request,
    Round,
    ServerState,
    sorted_client_ids,
)
from fedlearn.core.schedules import over_rounds
from fedlearn.errors import FedlearnError, TooManyFailures
from fedlearn.loop.async_loop import accumulate_buffer, fill_buffer
from fedlearn.loop.base_engine import require_engine
from fedlearn.loop.charging import LedgerJournal, actual_release, charges_ahead, planned_release
from fedlearn.loop.client_update import round_rate
from fedlearn.loop.evaluation_round import Evaluate, evaluate_round
from fedlearn.loop.failure_limit import check_failures
from fedlearn.loop.optimizer_averaging import with_kept_optimizer
from fedlearn.loop.protocols import AsyncEngine, Engine
from fedlearn.loop.rule_support import require_settings, require_steps
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.server_step import server_step
from fedlearn.loop.system_model import SystemModel
from fedlearn.loop.virtual_clock import VirtualClockEngine


def start(strategy: Strategy, params_D: Array, engine: Engine, *, seed: int) -> ServerState:
    """Return the server state before the first round, for the model of the engine."""
    return initial_server_state(strategy, params_D, engine.layout, seed=seed)


def initial_server_state(strategy: Strategy, params_D: Array, layout: Layout, *, seed: int) -> ServerState:
    """Return the server state before the first round, for a layout.

    Args:
        strategy: the algorithm.
        params_D: initial parameters.
        layout: layout of the model.
        seed: seed of the run, >= 0.
    """
    shared_layout = strategy.shared_layout(layout)
    guarantee = strategy.privacy_guarantee
    return ServerState(
        round=0,
        seed=seed,
        params_D=params_D,
        server=strategy.server.init(layout),
        stages=tuple(stage.server.init(shared_layout) for stage in strategy.stages),
        aggregate=strategy.aggregate.init_state(shared_layout),
        select=strategy.select.initial_state,
        ledger=Ledger() if guarantee is None else guarantee.initial_ledger,
    )


def federate(
    strategy: Strategy,
    engine: Engine,
    state: ServerState,
    *,
    schedule: Schedule,
    local: LocalSettings | None = None,
    evaluate: Evaluate | None = None,
    journal: LedgerJournal | None = None,
) -> Generator[Round, None, str | None]:
    """Run rounds ``state.round + 1`` to ``schedule.rounds``, and yield each.

    To stop, leave the loop. To resume, pass the state of the last round (and the client states of the engine). A round
    depends only on these states, so a resumed run equals an uninterrupted run bit for bit. If the next round would
    exceed the privacy budget of the strategy, the run ends before it, and all earlier rounds stay valid.

    In an asynchronous strategy, a round is one step of the server. Asynchronous strategies need a clock. An engine
    without a clock gets the clock of `fedlearn.loop.system_model.none`, on which every request takes one second.

    Args:
        strategy: the algorithm.
        engine: sends requests to the clients.
        state: server state from `start`, or from a checkpoint.
        schedule: rounds, evaluation and tolerated failures.
        local: settings of local training; default `LocalSettings()`.
        evaluate: turns predictions or metric sums of clients into an `Evaluation`; None (default) never evaluates.
        journal: keeps the ledger of a run whose uploads are private against the server, before each round and after
            it; see `fedlearn.loop.charging`. None (default) keeps none.

    Returns:
        The reason why the run ended before ``schedule.rounds`` (the value of ``StopIteration``), or None.

    Raises:
        TooManyFailures: More clients failed than ``schedule.max_failures`` allows. The last yielded state is valid. If
            the error has a ledger, it replaces the ledger of this state.
    """
    local = local or LocalSettings()
    require_settings(strategy.local, local)
    require_steps(strategy, local)
    strategy = with_kept_optimizer(strategy, local)
    local = replace(local, schedule=over_rounds(local.schedule, schedule.rounds))
    require_engine(engine)
    if strategy.asynchrony is not None and not isinstance(engine, AsyncEngine):
        engine = VirtualClockEngine(engine, SystemModel())
    while state.round < schedule.rounds:
        start_time = time.perf_counter()
        if strategy.asynchrony is not None:
            done = run_async_step(strategy, engine, state, schedule=schedule, local=local)
        else:
            cohort = _cohort(strategy, engine, state)
            refusal = strategy.privacy_guarantee and strategy.privacy_guarantee.refusal_reason(
                state.ledger, planned_release(state.round + 1, cohort)
            )
            if refusal:
                return refusal
            done = run_round(strategy, engine, state, cohort, schedule=schedule, local=local, journal=journal)
        state = done.state
        if evaluate is not None and schedule.is_evaluation_round(state.round):
            evaluation, failures = evaluate_round(strategy, engine, state, schedule, evaluate)
            done = replace(done, evaluation=evaluation, failures=done.failures + failures)
        yield replace(done, seconds=time.perf_counter() - start_time)
    return None


def _cohort(strategy: Strategy, engine: Engine, state: ServerState) -> tuple[ClientId, ...]:
    """Return the client ids of the next cohort, in ascending order."""
    number = state.round + 1
    rng = generator(state.seed, Purpose.SELECT, round=number)
    if engine.deployed and strategy.privacy_guarantee is not None:
        # the privacy guarantee requires a secret cohort, which does not follow from the settings of the run
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
    journal: LedgerJournal | None = None,
) -> Round:
    """Run one round of a synchronous strategy: train, aggregate, update the model, and charge the privacy ledger."""
    request = next_request(strategy, engine, state, local, cohort)
    with _charged_ahead(strategy, engine, state, cohort, journal) as results:
        for result in engine.fit(request, strategy, cohort):
            results.partial = accumulate(results.partial, strategy.aggregate, result)
            del result  # its memory serves the next clients
        partial = results.partial
        if cohort or not (strategy.privacy_guarantee and strategy.privacy_guarantee.supports_empty_rounds):
            check_failures(partial, len(cohort), schedule.max_failures)
    done = _finish_round(strategy, engine, state, request, partial, cohort)
    if engine.elapsed_s is None:
        return done
    clock = state.clock + engine.elapsed_s
    return replace(done, state=replace(done.state, clock=clock), clock=clock)


def run_async_step(
    strategy: Strategy, engine: Engine, state: ServerState, *, schedule: Schedule, local: LocalSettings
) -> Round:
    """Run one step of an asynchronous strategy: wait for updates with any staleness, aggregate, update the model."""
    assert isinstance(engine, AsyncEngine)
    request = next_request(strategy, engine, state, local)
    # a checkpoint does not store the values that follow from the settings
    in_flight = [
        replace(item, request=replace(item.request, local=local, deployed=engine.deployed)) for item in state.in_flight
    ]
    buffer = fill_buffer(strategy, engine, engine.clients, in_flight, request)
    initial = PartialAggregate(aggregator_state=strategy.aggregate.init(strategy.shared_layout(engine.layout)))
    partial = accumulate_buffer(initial, strategy, buffer, request.round)
    check_failures(partial, len(buffer.completed) + len(buffer.in_flight), schedule.max_failures)
    stale = {"staleness_K": buffer.staleness(request.round), "sent_D": buffer.mean_sent_params()}
    done = _finish_round(strategy, engine, state, request, partial, buffer.cohort, num_sent=buffer.num_sent, **stale)
    return replace(done, state=replace(done.state, clock=buffer.clock, in_flight=buffer.in_flight), clock=buffer.clock)


def next_request(
    strategy: Strategy,
    engine: Engine,
    state: ServerState,
    local: LocalSettings,
    cohort: Sequence[ClientId] = (),
) -> Request:
    """Return the request of the next round, with the current model, or with the model of each client of the cohort."""
    return Request(
        round=state.round + 1,
        seed=state.seed,
        params_D=state.params_D,
        broadcast=_broadcast(strategy, state),
        local=_local_settings(strategy, state, local),
        deployed=engine.deployed,
        clock=state.clock,
        client_models=_client_models(strategy, engine.layout, state, cohort),
    )


def _local_settings(strategy: Strategy, state: ServerState, local: LocalSettings) -> LocalSettings:
    """Return the settings of local training of the next round, with the number of steps that the strategy draws."""
    if strategy.local.num_steps is None:
        return local
    number = state.round + 1
    rng = generator(state.seed, Purpose.STEPS, round=number)
    return replace(local, epochs=1, steps=int(strategy.local.num_steps(number, rng)))


def _mean_steps(request: Request, partial: PartialAggregate, *, withheld: bool) -> float:
    """Return the mean number of local steps for `Context.num_steps`; 0 if clients withhold it."""
    if request.local.steps is not None:
        return float(request.local.steps)
    return 0.0 if withheld else float(np.mean(partial.num_steps_per_client))


def _client_models(
    strategy: Strategy, layout: Layout, state: ServerState, cohort: Sequence[ClientId]
) -> dict[ClientId, Array]:
    """Return the model of each client of the cohort; empty if all clients receive the global model.

    Each model has the personal and frozen parameters of the global model, because clients do not send them.
    """
    if strategy.aggregate.client_models is None:
        return {}
    models: dict[ClientId, Array] = dict.fromkeys(cohort, state.params_D)
    shared = strategy.shared_positions(layout)
    for client, model_S in strategy.aggregate.client_models(state.aggregate, tuple(cohort)).items():
        models[client] = np.array(as_numpy(state.params_D))
        models[client][shared] = as_numpy(model_S)
    return models


def _received_models(
    strategy: Strategy, layout: Layout, request: Request, clients: Sequence[ClientId]
) -> dict[str, Any]:
    """Return the fields of `Context` with the models that these clients received; empty for one global model."""
    if not request.client_models:
        return {}
    shared = strategy.shared_positions(layout)
    received_KD = np.stack([as_numpy(request.client_models[client])[shared] for client in clients])
    return {"received_KD": received_KD, "shared_D": as_numpy(request.params_D)[shared]}


def _finish_round(
    strategy: Strategy,
    engine: Engine,
    state: ServerState,
    request: Request,
    partial: PartialAggregate,
    cohort: tuple[ClientId, ...],
    *,
    num_sent: int | None = None,
    **async_values: Any,
) -> Round:
    """Compute the server's half of a round: aggregate, update the model, charge the privacy ledger.

    Args:
        strategy: the algorithm.
        engine: gives layout and population.
        state: server state before the round.
        request: the request of the round.
        partial: the accumulated results of the clients.
        cohort: ids of the clients.
        num_sent: number of requests sent; default one per client of the cohort.
        async_values: further fields of `Context` for asynchronous strategies.
    """
    number, guarantee = request.round, strategy.privacy_guarantee
    withheld = guarantee is not None and "examples" in guarantee.withheld
    context = Context(
        round=number,
        seed=state.seed,
        clients_K=np.array(partial.clients, np.int64),
        num_examples_K=np.array(partial.num_examples_per_client, np.int64),
        metrics={name: np.array(values) for name, values in partial.metrics_per_client.items()},
        num_clients=len(engine.clients),
        cohort_size=len(cohort),
        extra={name: divide_total(total, partial.num_updates) for name, total in partial.extra.items()},
        learning_rate=round_rate(request),
        num_steps=_mean_steps(request, partial, withheld=withheld),
        params_D=state.params_D,
        layout=strategy.shared_layout(engine.layout),
        model_layout=engine.layout,
        deployed=engine.deployed,
        **_received_models(strategy, engine.layout, request, partial.clients),
        **async_values,
    )
    update_D, aggregate = strategy.aggregate.finish(partial.aggregator_state, state.aggregate, context)
    params_D, server, stages = server_step(strategy, state, update_D, context, engine.layout)
    update_selection = strategy.select.update
    select = update_selection(state.select, context) if update_selection else state.select
    ledger = state.ledger if guarantee is None else guarantee.charge(state.ledger, actual_release(number, partial))
    num_values = engine.layout.num_parameters + sum(int(np.prod(v.shape)) for v in request.broadcast.values())
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
        failures=partial.failures,
        metrics={name: total / count for name, (total, count) in partial.metrics.items() if count},
        num_examples=None if withheld else partial.num_examples,
        privacy=None if guarantee is None else guarantee.epsilon_of(ledger),
        bytes_up=partial.bytes_up,
        bytes_down=(len(cohort) if num_sent is None else num_sent) * 4 * num_values,
    )


def _broadcast(strategy: Strategy, state: ServerState) -> dict[str, Array]:
    """Return the vectors that a request contains beside the model.

    The server optimizer and the aggregator send vectors to the local rule. The stages send vectors to their client
    halves.
    """
    stage_vectors = {
        f"stage/{i}/{name}": v
        for i, stage in enumerate(strategy.stages)
        for name, v in stage.server.broadcast(state.stages[i]).items()
    }
    aggregator_vectors = strategy.aggregate.broadcast(state.aggregate)
    return {**strategy.server.broadcast(state.server), **aggregator_vectors, **stage_vectors}


@dataclass
class _Results:
    """Accumulated results of a round, also of a round that fails."""

    partial: PartialAggregate


@contextmanager
def _charged_ahead(
    strategy: Strategy,
    engine: Engine,
    state: ServerState,
    cohort: Sequence[ClientId],
    journal: LedgerJournal | None,
) -> Iterator[_Results]:
    """Record the cost of a round before its requests go out, and after it; see `fedlearn.loop.charging`.

    If the block raises an error, the cost of all clients that may have sent an update remains.
    """
    initial = strategy.aggregate.init(strategy.shared_layout(engine.layout))
    results = _Results(PartialAggregate(aggregator_state=initial))
    guarantee, number = strategy.privacy_guarantee, state.round + 1
    if guarantee is None or not charges_ahead(strategy, engine):
        yield results
        return
    record = journal.record if journal else lambda ledger: None
    record(guarantee.charge(state.ledger, planned_release(number, cohort)))
    try:
        yield results
    except FedlearnError as error:
        spent = guarantee.charge(state.ledger, actual_release(number, results.partial, cohort))
        if isinstance(error, TooManyFailures):
            error.ledger = spent = state.ledger if error.is_before_sending else spent
        record(spent)
        raise
    record(guarantee.charge(state.ledger, actual_release(number, results.partial)))
