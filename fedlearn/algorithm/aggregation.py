"""Reduce the updates of many clients to one: means stream in constant memory, other rules see all updates at once.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from fedlearn.algorithm.transforms import Context, no_broadcast, no_state
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, Failure, MetricSum, State, Updates
from fedlearn.errors import is_number, require

WEIGHTINGS = ("examples", "equal")
READABLE = ("clients_K", "metrics", "extra")  # fields of `Updates` that a rule declares
TILE_SIZE = 2**17  # numbers that are added at a time: they stay in the cache


Rule = Callable[[Any, State, Context], tuple[Array, State]]


class Aggregator(NamedTuple):
    """Reduce the updates of a round to one update, block by block.

    Attributes:
        init: returns the empty partial state of a round, ``(layout) -> partial``.
        add: adds one block, ``(partial, updates) -> partial``; may reuse the memory of ``partial``.
        finalize: returns ``update_D`` of all added updates, ``(partial) -> update_D``. With ``rule``, it returns the
            first argument of the rule.
        sensitivity: largest L2 change of the result when the clipped update of one client changes,
            ``(clip_norm, cohort_size) -> float``; None if unknown, so that no privacy claim may rest on it.
        is_sum: whether the result is a (weighted) sum of updates; masking needs one.
        merge: joins two partial states, with the clients of the first one first. None: engines on several
            machines send whole updates.
        denominator: divisor of a sum that is fixed before the round; None if it depends on the responding clients.
            Noise at the server needs one: after dropouts, a smaller divisor would enlarge the share of each client.
        rule: last step of a round, ``(finalized, state, context) -> (update_D, state)``; None: there is no such step.
        init_state: returns the state of the rule before the first round, ``(layout) -> state``: named arrays.
            The server state and checkpoints hold it.
        broadcast: returns the D-vectors of this state that the next request carries to the clients.
        reads: fields of `Updates` about single clients that the rule needs: ``clients_K``, ``metrics``, ``extra``.
    """

    init: Callable[[Layout], State]
    add: Callable[[State, Updates], State]
    finalize: Callable[[State], Any]
    sensitivity: Callable[[float, int], float] | None = None
    is_sum: bool = False
    merge: Callable[[State, State], State] | None = None
    denominator: float | None = None
    rule: Rule | None = None
    init_state: Callable[[Layout], State] = no_state
    broadcast: Callable[[State], Mapping[str, Array]] = no_broadcast
    reads: tuple[str, ...] = ()

    def finish(self, partial: State, state: State, context: Context) -> tuple[Array, State]:
        """Return the aggregate of a round, and the state of the rule after it."""
        result = self.finalize(partial)
        return (result, state) if self.rule is None else self.rule(result, state, context)


def add_rows(total: Any, rows_KD: Array, weights_K: np.ndarray) -> Any:
    """Return ``total + sum_k weights_k rows_k``, added row by row in float64 (JAX: compensated float32).

    ``total`` is None or the result of an earlier call; `divide_total` takes it. The order of additions makes the result
    independent of the block size (NumPy: bit for bit). Memory is that of the sum and one tile of 1 MiB.
    """
    xp = array_namespace(rows_KD)
    if is_jax_array(rows_KD):
        return _add_rows_compensated(xp, total, rows_KD, weights_K)
    sum_D = xp.zeros(rows_KD.shape[1:], dtype=xp.float64, device=rows_KD.device) if total is None else total
    weights_K1 = xp.asarray(weights_K, dtype=xp.float64, device=rows_KD.device)[:, None]
    width = max(1, min(len(sum_D), TILE_SIZE))
    height = TILE_SIZE // width
    for start in range(0, len(sum_D), width):
        columns = slice(start, start + width)
        for k in range(0, len(rows_KD), height):
            tile = xp.astype(rows_KD[k : k + height, columns], xp.float64) * weights_K1[k : k + height]
            if height == 1:
                sum_D[columns] += tile[0]
            else:
                tile[0] += sum_D[columns]  # first, so that rows are added one after another
                sum_D[columns] = xp.sum(tile, axis=0)
    return sum_D


def _add_rows_compensated(xp: Any, total: Any, rows_KD: Array, weights_K: np.ndarray) -> Any:
    """Add by Neumaier's summation: JAX has no float64 unless a global flag turns it on."""
    nothing_D = xp.zeros(rows_KD.shape[1:], dtype=rows_KD.dtype, device=rows_KD.device)
    total = total or (nothing_D, nothing_D)
    for k, weight in enumerate(weights_K.tolist()):
        total = _add_compensated(xp, total, weight * rows_KD[k])
    return total


def _add_compensated(xp: Any, total: tuple[Array, Array], term_D: Array) -> tuple[Array, Array]:
    """Return a running sum and its rounding error, after one more term."""
    sum_D, lost_D = total
    new_D = sum_D + term_D
    larger = xp.abs(sum_D) >= xp.abs(term_D)
    return new_D, lost_D + xp.where(larger, (sum_D - new_D) + term_D, (term_D - new_D) + sum_D)


def add_totals(first: Any, second: Any) -> Any:
    """Return the sum of two results of `add_rows`, each of which may be None. Neither is changed."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, tuple):
        sum_D, lost_D = _add_compensated(array_namespace(first[0]), first, second[0])
        return sum_D, lost_D + second[1]
    return first + second


def divide_total(total: Any, divisor: float) -> Array:
    """Return the float32 vector ``total / divisor`` of a sum from `add_rows`."""
    if isinstance(total, tuple):
        return (total[0] + total[1]) / divisor
    if isinstance(total, np.ndarray):  # without a second vector in float64
        return np.divide(total, divisor, out=np.empty(total.shape, np.float32), casting="same_kind")
    xp = array_namespace(total)
    return xp.astype(total / divisor, xp.float32)


def mean(*, weighting: str = "examples") -> Aggregator:
    """Return an aggregator for the mean of updates, weighted by training examples or equally.

    Guarantees: independent of the order of blocks' boundaries; lies in the convex hull of the updates; exact when all
    updates are equal. With equal weights one client moves it by at most ``2 clip / cohort``.

    Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, *Communication-Efficient Learning of Deep Networks from
    Decentralized Data*, AISTATS 2017, arXiv:1602.05629.
    """
    expected = f"one of {', '.join(WEIGHTINGS)}"
    require(weighting in WEIGHTINGS, "weighting", weighting, expected, "weighting=examples")

    def add(memory: State, updates: Updates) -> State:
        equal = weighting == "equal"
        weights_K = np.ones(len(updates)) if equal else updates.num_examples_K.astype(np.float64)
        total = add_rows(memory["total"], updates.delta_KD, weights_K)
        return {"total": total, "weight": memory["weight"] + float(weights_K.sum())}

    def merge(one: State, other: State) -> State:
        total = add_totals(one["total"], other["total"])
        return {"total": total, "weight": one["weight"] + other["weight"]}

    return Aggregator(
        init=lambda layout: {"total": None, "weight": 0.0},
        add=add,
        finalize=lambda memory: divide_total(memory["total"], memory["weight"]),
        sensitivity=(lambda clip, cohort: 2 * clip / cohort) if weighting == "equal" else None,
        is_sum=True,
        merge=merge,
    )


def expected_mean(denominator: float, *, num_extra: int = 0) -> Aggregator:
    """Return an aggregator that divides the sum of updates by the expected number of clients.

    ``sum_k delta_k / denominator``: missing clients count as zero and never shrink the denominator.

    Args:
        denominator: the expected number of clients in a cohort, > 0.
        num_extra: numbers that a stage appends to the D parameters.

    *Guarantees*: adding or removing a client moves the result by at most ``clip / denominator``. Replacing its update
    moves it by at most ``2 clip / denominator``. An empty cohort gives zero.

    Reference: McMahan, Ramage, Talwar, Zhang, *Learning Differentially Private Recurrent Language Models*, ICLR 2018,
    arXiv:1710.06963 (the fixed-denominator estimator).
    """
    positive = is_number(denominator, at_least=0) and 0 < denominator < float("inf")
    require(positive, "denominator", denominator, "a finite number > 0", "denominator=100")

    def add(memory: State, updates: Updates) -> State:
        return {**memory, "total": add_rows(memory["total"], updates.delta_KD, np.ones(len(updates)))}

    def done(memory: State) -> Array:
        nobody = memory["total"] is None
        return np.zeros(memory["size"], np.float32) if nobody else divide_total(memory["total"], denominator)

    return Aggregator(
        init=lambda layout: {"total": None, "size": layout.num_parameters + num_extra},
        add=add,
        finalize=done,
        sensitivity=lambda clip, cohort: 2 * clip / denominator,
        is_sum=True,
        merge=lambda one, other: {**one, "total": add_totals(one["total"], other["total"])},
        denominator=float(denominator),
    )


def map_updates(transform: Callable[[Array], Array], aggregator: Aggregator) -> Aggregator:
    """Return an aggregator that first transforms each update: ``transform(updates_KD) -> updates_KD``."""

    def add(memory: State, updates: Updates) -> State:
        return aggregator.add(memory, replace(updates, delta_KD=transform(updates.delta_KD)))

    return Aggregator(init=aggregator.init, add=add, finalize=aggregator.finalize, merge=aggregator.merge)


def stacked(
    rule: Callable[[Updates, State, Context], tuple[Array, State]],
    *,
    init: Callable[[Layout], State] = no_state,
    broadcast: Callable[[State], Mapping[str, Array]] = no_broadcast,
    reads: Sequence[str] = (),
    sensitivity: Callable[[float, int], float] | None = None,
) -> Aggregator:
    """Return an aggregator from a rule that needs all updates of a round at once.

    Args:
        rule: ``(updates, state, context) -> (update_D, state)``. ``updates`` has one row per responding client, in
            ascending order of client ids: ``delta_KD``, ``num_examples_K``, ``num_steps_K``, ``clients_K`` and the
            fields in ``reads``. ``context`` has the round, the model ``params_D`` and a random generator.
        init: returns the state before the first round, named arrays. Checkpoints hold the state.
        broadcast: returns the D-vectors of the state that the next request carries, see `LocalRule.receives`.
        reads: fields of `Updates` about single clients that the rule needs: ``clients_K`` (the ids mean something to
            the rule), ``metrics`` (losses) and ``extra``. Other metrics and extra vectors are dropped.
        sensitivity: largest L2 change of the result when one clipped update changes,
            ``(clip_norm, cohort_size) -> float``; None if unknown.

    *Guarantees*: the rule runs once per round, after all blocks. Memory is that of all updates of the round.

    Raises:
        SettingError: ``reads`` names another field.

    >>> def largest(updates, state, context):
    ...     return updates.delta_KD.max(axis=0), state
    >>> stacked(largest).reads
    ()
    """
    known = set(reads) <= set(READABLE)
    require(known, "reads", tuple(reads), f"names among {', '.join(READABLE)}", 'reads=("metrics",)')

    def add(partial: State, updates: Updates) -> State:
        return {"blocks": (*partial["blocks"], _readable(updates, reads))}

    def merge(first: State, second: State) -> State:
        return {"blocks": first["blocks"] + second["blocks"]}

    def run(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        return rule(updates, state, replace(context, metrics={}))

    return Aggregator(
        init=lambda layout: {"blocks": ()},
        add=add,
        finalize=lambda partial: concat_updates(partial["blocks"]),
        merge=merge,
        sensitivity=sensitivity,
        rule=run,
        init_state=init,
        broadcast=broadcast,
        reads=tuple(reads),
    )


def _readable(updates: Updates, reads: Sequence[str]) -> Updates:
    """Return the updates without the fields that a rule does not need, so that they take no memory."""
    return Updates(
        clients_K=updates.clients_K,
        delta_KD=updates.delta_KD,
        num_examples_K=updates.num_examples_K,
        num_steps_K=updates.num_steps_K,
        metrics=updates.metrics if "metrics" in reads else {},
        extra=updates.extra if "extra" in reads else {},
    )


def concat_updates(blocks: Sequence[Updates]) -> Updates:
    """Return the blocks as one: rows, counts, metrics and extra vectors, without client states and payloads.

    A metric that a block does not have is NaN for its clients.
    """
    if len(blocks) == 1:
        return blocks[0]
    xp = array_namespace(blocks[0].delta_KD)
    metrics = dict.fromkeys(name for block in blocks for name in block.metrics)
    return Updates(
        clients_K=np.concatenate([block.clients_K for block in blocks]),
        delta_KD=xp.concat([block.delta_KD for block in blocks]),
        num_examples_K=np.concatenate([block.num_examples_K for block in blocks]),
        num_steps_K=np.concatenate([block.num_steps_K for block in blocks]),
        metrics={name: _concat_metric(name, blocks) for name in metrics},
        extra={name: xp.concat([block.extra[name] for block in blocks]) for name in blocks[0].extra},
    )


def _concat_metric(name: str, blocks: Sequence[Updates]) -> MetricSum:
    sums = [block.metrics.get(name) or MetricSum(np.zeros(len(block)), np.zeros(len(block))) for block in blocks]
    return MetricSum(np.concatenate([s.total_K for s in sums]), np.concatenate([s.count_K for s in sums]))


def aggregate_updates(
    aggregator: Aggregator, *blocks: Updates, state: State | None = None, context: Context | None = None
) -> tuple[Array, State]:
    """Return the aggregate of some blocks of updates, and the state of the aggregator after it.

    Args:
        aggregator: any aggregator.
        blocks: updates of one round, at least one block.
        state: state of the aggregator; None: the state before the first round.
        context: context of the round; None: that of round 1 with seed 0. Its layout describes the updates.
    """
    context = context or Context(round=1, seed=0)
    layout = context.layout or Layout.from_shapes([("updates", (int(blocks[0].delta_KD.shape[-1]),))])
    partial = aggregator.init(layout)
    for block in blocks:
        partial = aggregator.add(partial, block)
    state = aggregator.init_state(layout) if state is None else state
    return aggregator.finish(partial, state, replace(context, layout=layout))


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialAggregate:
    """Hold the running totals of a cohort; an engine may yield them instead of single blocks.

    Attributes:
        aggregator_state: partial state of the aggregator.
        failures: failures of clients.
        extra: sums of the further vectors of clients, from `add_rows`.
        metrics: total and count of each training metric.
        num_updates: number of responding clients.
        num_examples: their training examples.
        bytes_up: their payload in bytes.
        clients, num_examples_per_client, num_steps_per_client: id, training examples and local steps of each of them.
        metrics_per_client: training metrics of each of them; NaN for a client that did not send a metric.
    """

    aggregator_state: State
    failures: tuple[Failure, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    num_updates: int = 0
    num_examples: int = 0
    bytes_up: int = 0
    clients: tuple[int, ...] = ()
    num_examples_per_client: tuple[int, ...] = ()
    num_steps_per_client: tuple[int, ...] = ()
    metrics_per_client: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def accumulate(
    partial_aggregate: PartialAggregate, aggregator: Aggregator, result: Updates | PartialAggregate | Failure
) -> PartialAggregate:
    """Return a partial aggregate with one more result. May reuse its memory.

    *Guarantees*: merged partial aggregates of the parts of a cohort, in order of their clients, give the aggregate of
    the whole, up to the rounding of float64 sums.
    """
    if isinstance(result, Failure):
        return replace(partial_aggregate, failures=(*partial_aggregate.failures, result))
    if isinstance(result, PartialAggregate):
        return _merged(partial_aggregate, aggregator, result)
    return _with_updates(partial_aggregate, aggregator, result)


def _merged(one: PartialAggregate, aggregate: Aggregator, other: PartialAggregate) -> PartialAggregate:
    assert aggregate.merge is not None, "an engine may fold on its own only where the aggregator can merge"
    names = list(dict.fromkeys([*one.extra, *other.extra]))
    return PartialAggregate(
        aggregator_state=aggregate.merge(one.aggregator_state, other.aggregator_state),
        failures=one.failures + other.failures,
        extra={name: add_totals(one.extra.get(name), other.extra.get(name)) for name in names},
        metrics=_add_metrics(one.metrics, other.metrics),
        num_updates=one.num_updates + other.num_updates,
        num_examples=one.num_examples + other.num_examples,
        bytes_up=one.bytes_up + other.bytes_up,
        clients=one.clients + other.clients,
        num_examples_per_client=one.num_examples_per_client + other.num_examples_per_client,
        num_steps_per_client=one.num_steps_per_client + other.num_steps_per_client,
        metrics_per_client=_concat_values(
            one.metrics_per_client, len(one.clients), other.metrics_per_client, len(other.clients)
        ),
    )


def _concat_values(
    one: Mapping[str, tuple[float, ...]], num_one: int, other: Mapping[str, tuple[float, ...]], num_other: int
) -> dict[str, tuple[float, ...]]:
    """Return the metrics of some clients, followed by the metrics of other clients."""
    nan = (float("nan"),)
    return {name: one.get(name, nan * num_one) + other.get(name, nan * num_other) for name in {**one, **other}}


def _with_updates(gathered: PartialAggregate, aggregate: Aggregator, updates: Updates) -> PartialAggregate:
    ones_K = np.ones(len(updates))
    extra = {name: add_rows(gathered.extra.get(name), rows_KD, ones_K) for name, rows_KD in updates.extra.items()}
    metrics = {name: (float(m.total_K.sum()), float(m.count_K.sum())) for name, m in updates.metrics.items()}
    clients = tuple(updates.clients_K.tolist())
    told = {name: tuple(m.client_means().tolist()) for name, m in updates.metrics.items()}
    return PartialAggregate(
        aggregator_state=aggregate.add(gathered.aggregator_state, updates),
        failures=gathered.failures,
        extra={**gathered.extra, **extra},
        metrics=_add_metrics(gathered.metrics, metrics),
        num_updates=gathered.num_updates + len(updates),
        num_examples=gathered.num_examples + int(updates.num_examples_K.sum()),
        bytes_up=gathered.bytes_up + int(updates.num_bytes_K.sum()),
        clients=gathered.clients + clients,
        num_examples_per_client=gathered.num_examples_per_client + tuple(updates.num_examples_K.tolist()),
        num_steps_per_client=gathered.num_steps_per_client + tuple(updates.num_steps_K.tolist()),
        metrics_per_client=_concat_values(gathered.metrics_per_client, len(gathered.clients), told, len(clients)),
    )


def _add_metrics(
    one: Mapping[str, tuple[float, float]], other: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    sums = dict(one)
    for name, (total, count) in other.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)
    return sums
