"""From the updates of many clients to one: folds, so that a mean streams and a robust rule may stack.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from fedlearn.errors import is_number, require
from fedlearn.layout import Layout
from fedlearn.records import Array, Failure, Memory, Updates
from fedlearn.transform import Context

WEIGHTINGS = ("examples", "equal")
TILE = 2**17  # numbers that are added at a time: they stay in the cache


class Aggregator(NamedTuple):
    """A fold over blocks of updates.

    Attributes:
        init: the empty fold.
        add: take in one block; may reuse the memory it is given.
        done: ``update_D`` of all that was added.
        sensitivity: how far the result moves, at most, when one client's clipped update changes:
            ``(clip_norm, cohort_size) -> float``; None if unknown, so that no privacy claim may rest on it.
        sums: whether the result is a (weighted) sum of updates; masking needs one.
        denominator: what a sum is divided by, where it is fixed before the round whoever delivers; else None. Noise on
            the server needs one: where clients that drop out shrink it, each of the others counts for more.
        merge: two folds as one, the clients of the first before those of the second, so that engines on several
            machines may each fold their own; None: they send whole updates.
    """

    init: Callable[[Layout], Memory]
    add: Callable[[Memory, Updates], Memory]
    done: Callable[[Memory], Array]
    sensitivity: Callable[[float, int], float] | None = None
    sums: bool = False
    merge: Callable[[Memory, Memory], Memory] | None = None
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
    width = max(1, min(len(sum_D), TILE))
    height = TILE // width
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


def add_totals(one: Any, other: Any) -> Any:
    """The sum of two results of `add_rows`, each of which may be None. Neither is changed."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, tuple):
        sum_D, lost_D = _add_compensated(array_namespace(one[0]), one, other[0])
        return sum_D, lost_D + other[1]
    return one + other


def value(total: Any, divisor: float) -> Array:
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

    def add(memory: Memory, updates: Updates) -> Memory:
        equal = weighting == "equal"
        weights_K = np.ones(len(updates)) if equal else updates.num_examples_K.astype(np.float64)
        total = add_rows(memory["total"], updates.delta_KD, weights_K)
        return {"total": total, "weight": memory["weight"] + float(weights_K.sum())}

    def merge(one: Memory, other: Memory) -> Memory:
        total = add_totals(one["total"], other["total"])
        return {"total": total, "weight": one["weight"] + other["weight"]}

    return Aggregator(
        init=lambda layout: {"total": None, "weight": 0.0},
        add=add,
        done=lambda memory: value(memory["total"], memory["weight"]),
        sensitivity=(lambda clip, cohort: 2 * clip / cohort) if weighting == "equal" else None,
        sums=True,
        merge=merge,
    )


def expected_mean(denominator: float, *, more: int = 0) -> Aggregator:
    """The sum of updates, all of weight one, over the cohort that was to be expected.

    ``sum_k delta_k / denominator``: clients that are missing count as zero and never shrink the denominator.

    Args:
        denominator: the expected number of clients in a cohort, > 0.
        more: numbers that a stage sends along behind the D parameters.

    *Guarantees*: a client that is added or removed moves the result by at most ``clip / denominator``, one whose
    update is replaced by at most ``2 clip / denominator``, whatever the other clients do; no client at all gives zero.

    Reference: McMahan, Ramage, Talwar, Zhang, *Learning Differentially Private Recurrent Language Models*, ICLR 2018,
    arXiv:1710.06963 (the fixed-denominator estimator).
    """
    positive = is_number(denominator, at_least=0) and 0 < denominator < float("inf")
    require(positive, "denominator", denominator, "a finite number > 0", "denominator=100")

    def add(memory: Memory, updates: Updates) -> Memory:
        return {**memory, "total": add_rows(memory["total"], updates.delta_KD, np.ones(len(updates)))}

    def done(memory: Memory) -> Array:
        nobody = memory["total"] is None
        return np.zeros(memory["size"], np.float32) if nobody else value(memory["total"], denominator)

    return Aggregator(
        init=lambda layout: {"total": None, "size": layout.num_parameters + more},
        add=add,
        done=done,
        sensitivity=lambda clip, cohort: 2 * clip / denominator,
        sums=True,
        merge=lambda one, other: {**one, "total": add_totals(one["total"], other["total"])},
        denominator=float(denominator),
    )


def after(transform: Callable[[Array], Array], aggregate: Aggregator) -> Aggregator:
    """An aggregator whose updates the server transforms first: ``transform(updates_KD) -> updates_KD``, row by row."""

    def add(memory: Memory, updates: Updates) -> Memory:
        return aggregate.add(memory, replace(updates, delta_KD=transform(updates.delta_KD)))

    return Aggregator(init=aggregate.init, add=add, done=aggregate.done, merge=aggregate.merge)


def apart(
    each: Aggregator, names: Sequence[str], choice: Callable[[Updates], np.ndarray]
) -> tuple[Aggregator, Callable[[Memory, str], Array]]:
    """An aggregator of updates of several models, and what gives the aggregate of one of them: ``(fold, name)``.

    Args:
        each: folds the updates of one model.
        names: of the models; the aggregator's own result is that of the first.
        choice: which model each of a block's K updates is of, by its place in ``names``.

    *Guarantees*: the aggregate of a model that no update is of is zero.
    """

    def add(memory: Memory, updates: Updates) -> Memory:
        folds, chosen_K = dict(memory["folds"]), choice(updates)
        for j in np.unique(chosen_K).tolist():
            fold = folds.get(names[j]) or each.init(memory["layout"])
            folds[names[j]] = each.add(fold, updates.rows(chosen_K == j))
        return {**memory, "folds": folds}

    def of(memory: Memory, name: str) -> Array:
        folds, size = memory["folds"], memory["layout"].num_parameters
        return each.done(folds[name]) if name in folds else np.zeros(size, np.float32)

    def init(layout: Layout) -> Memory:
        return {"folds": {}, "layout": layout}

    return Aggregator(init=init, add=add, done=lambda memory: of(memory, names[0])), of


def stacked(rule: Callable[[Array, np.ndarray], Array]) -> Aggregator:
    """An aggregator from a rule that wants all updates at once: ``rule(updates_KD, num_examples_K) -> update_D``."""

    def add(memory: Memory, updates: Updates) -> Memory:
        return {"blocks": [*memory["blocks"], updates]}

    def done(memory: Memory) -> Array:
        return rule(_end_to_end(memory["blocks"]), np.concatenate([block.num_examples_K for block in memory["blocks"]]))

    def merge(one: Memory, other: Memory) -> Memory:
        return {"blocks": [*one["blocks"], *other["blocks"]]}

    return Aggregator(init=lambda layout: {"blocks": []}, add=add, done=done, merge=merge)


def _end_to_end(blocks: Sequence[Updates]) -> Array:
    xp = array_namespace(blocks[0].delta_KD)
    return xp.concat([block.delta_KD for block in blocks]) if len(blocks) > 1 else blocks[0].delta_KD


def kept() -> Aggregator:
    """Nothing but the updates themselves, for a rule that remembers, draws lots or must know who sent what.

    Such a rule is the server half of a strategy's last stage: it finds the updates with ``updates_of(context)`` and
    returns the aggregate in the place of the zero that this gives.
    """

    def add(memory: Memory, updates: Updates) -> Memory:
        return {**memory, "kept": (*memory["kept"], updates)}

    def merge(one: Memory, other: Memory) -> Memory:
        return {**one, "kept": one["kept"] + other["kept"]}

    return Aggregator(
        init=lambda layout: {"kept": (), "layout": layout},
        add=add,
        done=lambda memory: np.zeros(memory["layout"].num_parameters, np.float32),
        merge=merge,
    )


def updates_of(context: Context) -> Updates:
    """All updates of the round, for a rule over `kept` ones: ids, update and number of examples of each client."""
    blocks = context.fold["kept"]
    return Updates(
        clients_K=np.concatenate([block.clients_K for block in blocks]),
        delta_KD=_end_to_end(blocks),
        num_examples_K=np.concatenate([block.num_examples_K for block in blocks]),
        num_steps_K=np.concatenate([block.num_steps_K for block in blocks]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Running totals over what a cohort brought back; an engine may hand over these instead of single blocks.

    Attributes:
        fold: the aggregator's.
        failures: of the clients that did not deliver.
        extra: sums of what else clients sent, as `add_rows` makes them.
        metrics: total and count of each training metric.
        num_updates: clients that delivered.
        num_examples: their training examples.
        bytes_up: what they sent.
        clients, examples, steps: each that delivered, its training examples and its local steps.
        told: each training metric, of each that delivered; NaN where one did not tell it.
    """

    fold: Memory
    failures: tuple[Failure, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    num_updates: int = 0
    num_examples: int = 0
    bytes_up: int = 0
    clients: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    told: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def gather(gathered: Gathered, aggregate: Aggregator, result: Updates | Gathered | Failure) -> Gathered:
    """What was gathered, and one result more; may reuse the fold that it is given.

    *Guarantees*: for an aggregator with ``merge``, folding parts of a cohort apart and gathering them in the order of
    their clients gives what folding the whole gives, up to the rounding of float64 sums.
    """
    if isinstance(result, Failure):
        return replace(gathered, failures=(*gathered.failures, result))
    if isinstance(result, Gathered):
        return _merged(gathered, aggregate, result)
    return _with_updates(gathered, aggregate, result)


def _merged(one: Gathered, aggregate: Aggregator, other: Gathered) -> Gathered:
    assert aggregate.merge is not None, "an engine may fold on its own only where the aggregator can merge"
    names = list(dict.fromkeys([*one.extra, *other.extra]))
    return Gathered(
        fold=aggregate.merge(one.fold, other.fold),
        failures=one.failures + other.failures,
        extra={name: add_totals(one.extra.get(name), other.extra.get(name)) for name in names},
        metrics=_add_metrics(one.metrics, other.metrics),
        num_updates=one.num_updates + other.num_updates,
        num_examples=one.num_examples + other.num_examples,
        bytes_up=one.bytes_up + other.bytes_up,
        clients=one.clients + other.clients,
        examples=one.examples + other.examples,
        steps=one.steps + other.steps,
        told=_told(one.told, len(one.clients), other.told, len(other.clients)),
    )


def _told(
    one: Mapping[str, tuple[float, ...]], num_one: int, other: Mapping[str, tuple[float, ...]], num_other: int
) -> dict[str, tuple[float, ...]]:
    """What some clients told, and others after them."""
    nan = (float("nan"),)
    return {name: one.get(name, nan * num_one) + other.get(name, nan * num_other) for name in {**one, **other}}


def _with_updates(gathered: Gathered, aggregate: Aggregator, updates: Updates) -> Gathered:
    ones_K = np.ones(len(updates))
    extra = {name: add_rows(gathered.extra.get(name), rows_KD, ones_K) for name, rows_KD in updates.extra.items()}
    metrics = {name: (float(m.total_K.sum()), float(m.count_K.sum())) for name, m in updates.metrics.items()}
    clients = tuple(updates.clients_K.tolist())
    told = {name: tuple(m.means().tolist()) for name, m in updates.metrics.items()}
    return Gathered(
        fold=aggregate.add(gathered.fold, updates),
        failures=gathered.failures,
        extra={**gathered.extra, **extra},
        metrics=_add_metrics(gathered.metrics, metrics),
        num_updates=gathered.num_updates + len(updates),
        num_examples=gathered.num_examples + int(updates.num_examples_K.sum()),
        bytes_up=gathered.bytes_up + int(updates.num_bytes_K.sum()),
        clients=gathered.clients + clients,
        examples=gathered.examples + tuple(updates.num_examples_K.tolist()),
        steps=gathered.steps + tuple(updates.num_steps_K.tolist()),
        told=_told(gathered.told, len(gathered.clients), told, len(clients)),
    )


def _add_metrics(
    one: Mapping[str, tuple[float, float]], other: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    sums = dict(one)
    for name, (total, count) in other.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)
    return sums
