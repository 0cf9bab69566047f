"""Reduce the updates of many clients to one: means stream in constant memory, other rules see all updates at once.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from fedlearn.algorithm.transforms import Context, no_broadcast, no_state
from fedlearn.core.layout import Layout
from fedlearn.core.memory import release_pages
from fedlearn.core.records import Array, ClientId, Failure, MetricSum, State, Updates
from fedlearn.core.threads import map_in_threads
from fedlearn.errors import is_number, require

WEIGHTINGS = ("examples", "equal")
READABLE = ("clients_K", "metrics", "extra")  # fields of `Updates` that a rule declares
TILE_SIZE = 2**16  # numbers that are added at a time; they fit into the cache
COLUMNS_PER_THREAD = 2**21  # numbers that a thread adds without another one
MIN_SHRUNK_SIZE = 2**24  # numbers; from this size on, a mean takes the memory of its sum
MIN_THREADED_SIZE = 2**23  # numbers; below this size, the start of threads takes longer than they save


Rule = Callable[[Any, State, Context], tuple[Array, State]]
ClientModels = Callable[[State, tuple[ClientId, ...]], Mapping[ClientId, Array]]


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
            The server state and checkpoints contain it.
        broadcast: returns the D-vectors of this state that the next request carries to the clients.
        reads: fields of `Updates` about single clients that the rule needs: ``clients_K``, ``metrics``, ``extra``.
        client_models: returns the models that clients of the next cohort receive in place of the global model,
            ``(state, cohort) -> {client: model}``, with the shared parameters of each model. The global model goes to
            clients that it leaves out. None: all clients receive the global model.
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
    client_models: ClientModels | None = None

    def finish(self, partial: State, state: State, context: Context) -> tuple[Array, State]:
        """Return the aggregate of a round, and the state of the rule after it."""
        result = self.finalize(partial)
        return (result, state) if self.rule is None else self.rule(result, state, context)


def add_rows(total: Any, rows_KD: Array, weights_K: np.ndarray) -> Any:
    """Return ``total + sum_k weights_k rows_k``, added row by row in float64 (JAX: compensated float32).

    ``total`` is None or the result of an earlier call; pass the result to `divide_total`. The result does not depend on
    the block size (NumPy: bit for bit), because rows are added in order. It needs memory for the sum and
    one tile per core. Large NumPy arrays use all cores. On a GPU, a large row is one tile, because each operation has
    a fixed cost there.
    """
    xp = array_namespace(rows_KD)
    if is_jax_array(rows_KD):
        return _add_rows_compensated(xp, total, rows_KD, weights_K)
    sum_D = xp.zeros(rows_KD.shape[1:], dtype=xp.float64, device=rows_KD.device) if total is None else total
    if isinstance(rows_KD, np.ndarray) and len(sum_D) > TILE_SIZE:
        _add_large_rows(sum_D, rows_KD, weights_K)
        return sum_D
    weights_K1 = xp.asarray(weights_K, dtype=xp.float64, device=rows_KD.device)[:, None]
    height = max(1, TILE_SIZE // max(1, len(sum_D)))
    for k in range(0, len(rows_KD), height):
        tile = xp.astype(rows_KD[k : k + height], xp.float64) * weights_K1[k : k + height]
        if height == 1:
            sum_D += tile[0]
        else:
            tile[0] += sum_D  # first, so that rows are added one after another
            sum_D[:] = xp.sum(tile, axis=0)
    return sum_D


def _add_large_rows(sum_D: np.ndarray, rows_KD: np.ndarray, weights_K: np.ndarray) -> None:
    """Add rows of NumPy to a sum in place, tile by tile. Each thread has one tile, which stays in its cache."""

    def add_columns(start: int) -> None:
        buffer = np.empty(TILE_SIZE)
        end = min(start + COLUMNS_PER_THREAD, len(sum_D))
        for first in range(start, end, TILE_SIZE):
            columns = slice(first, min(first + TILE_SIZE, end))
            part = sum_D[columns]  # a view: `sum_D[columns] += ...` would copy the result once more
            tile = buffer[: len(part)]
            for row_D, weight in zip(rows_KD, weights_K, strict=True):
                tile[:] = row_D[columns]
                tile *= weight
                part += tile

    starts = range(0, len(sum_D), COLUMNS_PER_THREAD)
    is_threaded = len(starts) > 1 and rows_KD.size >= MIN_THREADED_SIZE
    deque(map_in_threads(add_columns, starts) if is_threaded else map(add_columns, starts), maxlen=0)


def _add_rows_compensated(xp: Any, total: Any, rows_KD: Array, weights_K: np.ndarray) -> Any:
    """Add the rows by Neumaier's summation, because JAX needs a global flag for float64."""
    zeros_D = xp.zeros(rows_KD.shape[1:], dtype=rows_KD.dtype, device=rows_KD.device)
    total = total or (zeros_D, zeros_D)
    for k, weight in enumerate(weights_K.tolist()):
        total = _add_compensated(xp, total, weight * rows_KD[k])
    return total


def _add_compensated(xp: Any, total: tuple[Array, Array], term_D: Array) -> tuple[Array, Array]:
    """Add a term to a running sum, and return the sum and its rounding error."""
    sum_D, error_D = total
    new_D = sum_D + term_D
    larger = xp.abs(sum_D) >= xp.abs(term_D)
    return new_D, error_D + xp.where(larger, (sum_D - new_D) + term_D, (term_D - new_D) + sum_D)


def add_totals(first: Any, second: Any) -> Any:
    """Return the sum of two results of `add_rows`. Each may be None, and neither is changed."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, tuple):
        sum_D, error_D = _add_compensated(array_namespace(first[0]), first, second[0])
        return sum_D, error_D + second[1]
    return first + second


def divide_total(total: Any, divisor: float) -> Array:
    """Return the float32 vector ``total / divisor`` of a sum from `add_rows`.

    The result takes the memory of a large sum, so do not use the sum after this call.
    """
    if isinstance(total, tuple):
        return (total[0] + total[1]) / divisor
    if isinstance(total, np.ndarray) and total.size >= MIN_SHRUNK_SIZE and _is_plain_sum(total):
        return _divide_in_place(total, divisor)
    if isinstance(total, np.ndarray):  # avoids a second float64 vector
        return np.divide(total, divisor, out=np.empty(total.shape, np.float32), casting="same_kind")
    xp = array_namespace(total)
    return xp.astype(total / divisor, xp.float32)


def _is_plain_sum(total: np.ndarray) -> bool:
    """Return whether an array is a float64 vector in memory of its own."""
    return total.dtype == np.float64 and total.ndim == 1 and total.flags.owndata and total.flags.writeable


def _divide_in_place(total_D: np.ndarray, divisor: float) -> np.ndarray:
    """Return ``total / divisor`` in the first half of the memory of ``total``, which is then no sum any more.

    The second half returns to the kernel, so that the new model can have its pages.
    """
    size, result_D = len(total_D), total_D.view(np.float32)
    for start in range(0, size, TILE_SIZE):  # a tile is read before its place, or a later place, is overwritten
        stop = min(start + TILE_SIZE, size)
        result_D[start:stop] = total_D[start:stop] / divisor
    release_pages(result_D[size:])
    return result_D[:size]


def mean(*, weighting: str = "examples") -> Aggregator:
    """Return an aggregator for the mean of updates, weighted by training examples or equally.

    *Guarantees*: the result does not depend on the division into blocks and is in the convex hull of the updates. It is
    exact if all updates are equal. With equal weights one client moves it by at most ``2 clip / cohort``.

    Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, *Communication-Efficient Learning of Deep Networks from
    Decentralized Data*, AISTATS 2017, arXiv:1602.05629.
    """
    expected = f"one of {', '.join(WEIGHTINGS)}"
    require(weighting in WEIGHTINGS, "weighting", weighting, expected, "weighting=examples")

    def add(partial: State, updates: Updates) -> State:
        is_equal = weighting == "equal"
        weights_K = np.ones(len(updates)) if is_equal else updates.num_examples_K.astype(np.float64)
        total = add_rows(partial["total"], updates.delta_KD, weights_K)
        return {"total": total, "weight": partial["weight"] + float(weights_K.sum())}

    def merge(first: State, second: State) -> State:
        total = add_totals(first["total"], second["total"])
        return {"total": total, "weight": first["weight"] + second["weight"]}

    return Aggregator(
        init=lambda layout: {"total": None, "weight": 0.0},
        add=add,
        finalize=lambda partial: divide_total(partial["total"], partial["weight"]),
        sensitivity=(lambda clip, cohort: 2 * clip / cohort) if weighting == "equal" else None,
        is_sum=True,
        merge=merge,
    )


def expected_mean(denominator: float, *, num_extra: int = 0) -> Aggregator:
    """Return an aggregator that divides the sum of updates by the expected number of clients.

    ``sum_k delta_k / denominator``: missing clients count as zero and do not reduce the denominator.

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

    def add(partial: State, updates: Updates) -> State:
        return {**partial, "total": add_rows(partial["total"], updates.delta_KD, np.ones(len(updates)))}

    def finalize(partial: State) -> Array:
        if partial["total"] is None:
            return np.zeros(partial["size"], np.float32)
        return divide_total(partial["total"], denominator)

    return Aggregator(
        init=lambda layout: {"total": None, "size": layout.num_parameters + num_extra},
        add=add,
        finalize=finalize,
        sensitivity=lambda clip, cohort: 2 * clip / denominator,
        is_sum=True,
        merge=lambda first, second: {**first, "total": add_totals(first["total"], second["total"])},
        denominator=float(denominator),
    )


def map_updates(transform: Callable[[Array], Array], aggregator: Aggregator) -> Aggregator:
    """Return an aggregator that first transforms each update: ``transform(updates_KD) -> updates_KD``."""

    def add(partial: State, updates: Updates) -> State:
        return aggregator.add(partial, replace(updates, delta_KD=transform(updates.delta_KD)))

    return Aggregator(init=aggregator.init, add=add, finalize=aggregator.finalize, merge=aggregator.merge)


def stacked(
    rule: Callable[[Updates, State, Context], tuple[Array, State]],
    *,
    init: Callable[[Layout], State] = no_state,
    broadcast: Callable[[State], Mapping[str, Array]] = no_broadcast,
    reads: Sequence[str] = (),
    sensitivity: Callable[[float, int], float] | None = None,
    client_models: ClientModels | None = None,
) -> Aggregator:
    """Return an aggregator from a rule that needs all updates of a round at once.

    Args:
        rule: ``(updates, state, context) -> (update_D, state)``. ``updates`` has one row per responding client, in
            ascending order of client ids: ``delta_KD``, ``num_examples_K``, ``num_steps_K``, ``clients_K`` and the
            fields in ``reads``. ``context`` has the round, the model ``params_D`` and a random generator.
        init: returns the state before the first round: named arrays. Checkpoints contain the state.
        broadcast: returns the D-vectors of the state that the next request carries, see `LocalRule.receives`.
        reads: fields of `Updates` about single clients that the rule needs: ``clients_K`` (if the rule depends on the
            ids), ``metrics`` (losses) and ``extra``. Other metrics and extra vectors are dropped.
        sensitivity: largest L2 change of the result when one clipped update changes,
            ``(clip_norm, cohort_size) -> float``; None if unknown.
        client_models: see `Aggregator.client_models`. The rule gets these models as ``context.received_KD``.

    *Guarantees*: the rule runs once per round, after all blocks. It needs memory for all updates of the round.

    Raises:
        SettingError: ``reads`` has another name.

    >>> def largest(updates, state, context):
    ...     return updates.delta_KD.max(axis=0), state
    >>> stacked(largest).reads
    ()
    """
    is_known = set(reads) <= set(READABLE)
    require(is_known, "reads", tuple(reads), f"names among {', '.join(READABLE)}", 'reads=("metrics",)')

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
        client_models=client_models,
    )


def _readable(updates: Updates, reads: Sequence[str]) -> Updates:
    """Drop the fields that a rule does not need, to save memory."""
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
        context: context of the round; None: round 1 with seed 0. Its layout describes the updates.
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
    """Hold the partial aggregate of a cohort. An engine may yield it instead of single blocks.

    Attributes:
        aggregator_state: partial state of the aggregator.
        failures: failures of clients.
        extra: sums of the extra vectors of clients, from `add_rows`.
        metrics: total and count of each training metric.
        num_updates: number of responding clients.
        num_examples: number of training examples of these clients.
        bytes_up: size of their payloads, bytes.
        clients, num_examples_per_client, num_steps_per_client: id, training examples and local steps of each client.
        metrics_per_client: training metrics of each client; NaN for a client that did not send a metric.
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
    """Return a partial aggregate with one more result. It may reuse the memory of the input.

    *Guarantees*: partial aggregates of parts of a cohort can be merged, in order of their clients. The result equals
    the aggregate of the whole cohort, up to the rounding of float64 sums.
    """
    if isinstance(result, Failure):
        return replace(partial_aggregate, failures=(*partial_aggregate.failures, result))
    if isinstance(result, PartialAggregate):
        return _merge(partial_aggregate, aggregator, result)
    return _add_updates(partial_aggregate, aggregator, result)


def _merge(first: PartialAggregate, aggregate: Aggregator, second: PartialAggregate) -> PartialAggregate:
    assert aggregate.merge is not None, "partial aggregates need an aggregator with merge"
    names = list(dict.fromkeys([*first.extra, *second.extra]))
    return PartialAggregate(
        aggregator_state=aggregate.merge(first.aggregator_state, second.aggregator_state),
        failures=first.failures + second.failures,
        extra={name: add_totals(first.extra.get(name), second.extra.get(name)) for name in names},
        metrics=_add_metrics(first.metrics, second.metrics),
        num_updates=first.num_updates + second.num_updates,
        num_examples=first.num_examples + second.num_examples,
        bytes_up=first.bytes_up + second.bytes_up,
        clients=first.clients + second.clients,
        num_examples_per_client=first.num_examples_per_client + second.num_examples_per_client,
        num_steps_per_client=first.num_steps_per_client + second.num_steps_per_client,
        metrics_per_client=_concat_values(
            first.metrics_per_client, len(first.clients), second.metrics_per_client, len(second.clients)
        ),
    )


def _concat_values(
    first: Mapping[str, tuple[float, ...]], num_first: int, second: Mapping[str, tuple[float, ...]], num_second: int
) -> dict[str, tuple[float, ...]]:
    """Return the metrics of some clients, followed by the metrics of other clients."""
    nan = (float("nan"),)
    return {name: first.get(name, nan * num_first) + second.get(name, nan * num_second) for name in {**first, **second}}


def _add_updates(partial: PartialAggregate, aggregate: Aggregator, updates: Updates) -> PartialAggregate:
    ones_K = np.ones(len(updates))
    extra = {name: add_rows(partial.extra.get(name), rows_KD, ones_K) for name, rows_KD in updates.extra.items()}
    metrics = {name: (float(m.total_K.sum()), float(m.count_K.sum())) for name, m in updates.metrics.items()}
    clients = tuple(updates.clients_K.tolist())
    metrics_per_client = {name: tuple(m.client_means().tolist()) for name, m in updates.metrics.items()}
    return PartialAggregate(
        aggregator_state=aggregate.add(partial.aggregator_state, updates),
        failures=partial.failures,
        extra={**partial.extra, **extra},
        metrics=_add_metrics(partial.metrics, metrics),
        num_updates=partial.num_updates + len(updates),
        num_examples=partial.num_examples + int(updates.num_examples_K.sum()),
        bytes_up=partial.bytes_up + int(updates.num_bytes_K.sum()),
        clients=partial.clients + clients,
        num_examples_per_client=partial.num_examples_per_client + tuple(updates.num_examples_K.tolist()),
        num_steps_per_client=partial.num_steps_per_client + tuple(updates.num_steps_K.tolist()),
        metrics_per_client=_concat_values(
            partial.metrics_per_client, len(partial.clients), metrics_per_client, len(clients)
        ),
    )


def _add_metrics(
    first: Mapping[str, tuple[float, float]], second: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    sums = dict(first)
    for name, (total, count) in second.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)
    return sums
