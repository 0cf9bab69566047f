"""From the updates of many clients to one: folds, so that a mean streams and a robust rule may stack.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from fedlearn.algorithm.transforms import Context
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, Failure, State, Updates
from fedlearn.errors import is_number, require

WEIGHTINGS = ("examples", "equal")
TILE_SIZE = 2**17  # numbers that are added at a time: they stay in the cache


class Aggregator(NamedTuple):
    """A fold over blocks of updates.

    Attributes:
        init: the empty fold.
        add: take in one block; may reuse the memory it is given.
        finalize: ``update_D`` of all that was added.
        sensitivity: how far the result moves, at most, when one client's clipped update changes:
            ``(clip_norm, cohort_size) -> float``; None if unknown, so that no privacy claim may rest on it.
        is_sum: whether the result is a (weighted) sum of updates; masking needs one.
        denominator: what a sum is divided by, where it is fixed before the round whoever delivers; else None. Noise on
            the server needs one: where clients that drop out shrink it, each of the others counts for more.
        merge: two folds as one, the clients of the first before those of the second, so that engines on several
            machines may each fold their own; None: they send whole updates.
    """

    init: Callable[[Layout], State]
    add: Callable[[State, Updates], State]
    finalize: Callable[[State], Array]
    sensitivity: Callable[[float, int], float] | None = None
    is_sum: bool = False
    merge: Callable[[State, State], State] | None = None
    denominator: float | None = None


def add_rows(total: Any, rows_KD: Array, weights_K: np.ndarray) -> Any:
    """``total + sum_k weights_k rows_k``, one row after another in float64 (in compensated float32 in JAX).

    ``total`` is None or what an earlier call returned; hand it to `value`. Adding row by row makes the result
    independent of how the cohort was cut into blocks (of NumPy arrays: bit for bit). Besides the sum it takes the
    memory of one tile of 1 MiB.
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
    """Neumaier's summation: JAX has no float64 unless a global flag turns it on."""
    nothing_D = xp.zeros(rows_KD.shape[1:], dtype=rows_KD.dtype, device=rows_KD.device)
    total = total or (nothing_D, nothing_D)
    for k, weight in enumerate(weights_K.tolist()):
        total = _add_compensated(xp, total, weight * rows_KD[k])
    return total


def _add_compensated(xp: Any, total: tuple[Array, Array], term_D: Array) -> tuple[Array, Array]:
    """A running sum and what it has lost to rounding, with one term more."""
    sum_D, lost_D = total
    new_D = sum_D + term_D
    larger = xp.abs(sum_D) >= xp.abs(term_D)
    return new_D, lost_D + xp.where(larger, (sum_D - new_D) + term_D, (term_D - new_D) + sum_D)


def add_totals(first: Any, second: Any) -> Any:
    """The sum of two results of `add_rows`, each of which may be None. Neither is changed."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, tuple):
        sum_D, lost_D = _add_compensated(array_namespace(first[0]), first, second[0])
        return sum_D, lost_D + second[1]
    return first + second


def divide_total(total: Any, divisor: float) -> Array:
    """The float32 vector ``total / divisor`` of a sum made by `add_rows`."""
    if isinstance(total, tuple):
        return (total[0] + total[1]) / divisor
    if isinstance(total, np.ndarray):  # without a second vector in float64
        return np.divide(total, divisor, out=np.empty(total.shape, np.float32), casting="same_kind")
    xp = array_namespace(total)
    return xp.astype(total / divisor, xp.float32)


def mean(*, weighting: str = "examples") -> Aggregator:
    """The mean of updates, weighted by training examples or equally.

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
    """The sum of updates, all of weight one, over the cohort that was to be expected.

    ``sum_k delta_k / denominator``: clients that are missing count as zero and never shrink the denominator.

    Args:
        denominator: the expected number of clients in a cohort, > 0.
        num_extra: numbers that a stage sends along behind the D parameters.

    *Guarantees*: a client that is added or removed moves the result by at most ``clip / denominator``, one whose
    update is replaced by at most ``2 clip / denominator``, whatever the other clients do; no client at all gives zero.

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
    """An aggregator whose updates the server transforms first: ``transform(updates_KD) -> updates_KD``, row by row."""

    def add(memory: State, updates: Updates) -> State:
        return aggregator.add(memory, replace(updates, delta_KD=transform(updates.delta_KD)))

    return Aggregator(init=aggregator.init, add=add, finalize=aggregator.finalize, merge=aggregator.merge)


def per_model(
    aggregator: Aggregator, model_names: Sequence[str], assign: Callable[[Updates], np.ndarray]
) -> tuple[Aggregator, Callable[[State, str], Array]]:
    """An aggregator of updates of several models, and what gives the aggregate of one of them: ``(fold, name)``.

    Args:
        aggregator: folds the updates of one model.
        model_names: of the models; the aggregator's own result is that of the first.
        assign: which model each of a block's K updates is of, by its place in ``model_names``.

    *Guarantees*: the aggregate of a model that no update is of is zero.
    """

    def add(memory: State, updates: Updates) -> State:
        models, chosen_K = dict(memory["models"]), assign(updates)
        for j in np.unique(chosen_K).tolist():
            fold = models.get(model_names[j]) or aggregator.init(memory["layout"])
            models[model_names[j]] = aggregator.add(fold, updates.rows(chosen_K == j))
        return {**memory, "models": models}

    def of(memory: State, name: str) -> Array:
        models, size = memory["models"], memory["layout"].num_parameters
        return aggregator.finalize(models[name]) if name in models else np.zeros(size, np.float32)

    def init(layout: Layout) -> State:
        return {"models": {}, "layout": layout}

    return Aggregator(init=init, add=add, finalize=lambda memory: of(memory, model_names[0])), of


def stacked(rule: Callable[[Array, np.ndarray], Array]) -> Aggregator:
    """An aggregator from a rule that wants all updates at once: ``rule(updates_KD, num_examples_K) -> update_D``."""

    def add(memory: State, updates: Updates) -> State:
        return {"blocks": [*memory["blocks"], updates]}

    def done(memory: State) -> Array:
        return rule(_end_to_end(memory["blocks"]), np.concatenate([block.num_examples_K for block in memory["blocks"]]))

    def merge(one: State, other: State) -> State:
        return {"blocks": [*one["blocks"], *other["blocks"]]}

    return Aggregator(init=lambda layout: {"blocks": []}, add=add, finalize=done, merge=merge)


def _end_to_end(blocks: Sequence[Updates]) -> Array:
    xp = array_namespace(blocks[0].delta_KD)
    return xp.concat([block.delta_KD for block in blocks]) if len(blocks) > 1 else blocks[0].delta_KD


def collect_updates() -> Aggregator:
    """Nothing but the updates themselves, for a rule that remembers, draws lots or must know who sent what.

    Such a rule is the server half of a strategy's last stage: it finds the updates with
    ``collected_updates(context)`` and returns the aggregate in the place of the zero that this gives.
    """

    def add(memory: State, updates: Updates) -> State:
        return {**memory, "updates": (*memory["updates"], updates)}

    def merge(one: State, other: State) -> State:
        return {**one, "updates": one["updates"] + other["updates"]}

    return Aggregator(
        init=lambda layout: {"updates": (), "layout": layout},
        add=add,
        finalize=lambda memory: np.zeros(memory["layout"].num_parameters, np.float32),
        merge=merge,
    )


def collected_updates(context: Context) -> Updates:
    """All updates of the round, as `collect_updates` holds them: ids, update and number of examples of each client."""
    blocks = context.aggregator_state["updates"]
    return Updates(
        clients_K=np.concatenate([block.clients_K for block in blocks]),
        delta_KD=_end_to_end(blocks),
        num_examples_K=np.concatenate([block.num_examples_K for block in blocks]),
        num_steps_K=np.concatenate([block.num_steps_K for block in blocks]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialAggregate:
    """Running totals over what a cohort brought back; an engine may hand over these instead of single blocks.

    Attributes:
        aggregator_state: the aggregator's.
        failures: of the clients that did not deliver.
        extra: sums of what else clients sent, as `add_rows` makes them.
        metrics: total and count of each training metric.
        num_updates: clients that delivered.
        num_examples: their training examples.
        bytes_up: what they sent.
        clients, examples, steps: each that delivered, its training examples and its local steps.
        metrics_per_client: each training metric, of each that delivered; NaN where one did not tell it.
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
    """What was gathered, and one result more; may reuse the fold that it is given.

    *Guarantees*: for an aggregator with ``merge``, folding parts of a cohort apart and gathering them in the order of
    their clients gives what folding the whole gives, up to the rounding of float64 sums.
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
        metrics_per_client=_told(
            one.metrics_per_client, len(one.clients), other.metrics_per_client, len(other.clients)
        ),
    )


def _told(
    one: Mapping[str, tuple[float, ...]], num_one: int, other: Mapping[str, tuple[float, ...]], num_other: int
) -> dict[str, tuple[float, ...]]:
    """What some clients told, and others after them."""
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
        metrics_per_client=_told(gathered.metrics_per_client, len(gathered.clients), told, len(clients)),
    )


def _add_metrics(
    one: Mapping[str, tuple[float, float]], other: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    sums = dict(one)
    for name, (total, count) in other.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)
    return sums
