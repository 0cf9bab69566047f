"""Define the task ``survival``: the time until an event, which may be censored.

Targets are ``(N, 2)``: the time, and 1 for an event or 0 for the end of the observation without an event. A model has
one output, the logarithm of the relative hazard. Its loss is the negative logarithm of Cox's partial likelihood, with
Efron's treatment of tied times. A risk set contains the examples of one batch, and in the evaluation of one client. So
a model that all clients train is a Cox model with one baseline hazard per client, a stratified Cox model.

An example with time 0 and without an event is in no risk set: it has no information.

Shapes: K segments, N examples, C outputs, P pairs.

References: D. R. Cox, *Regression Models and Life-Tables*, JRSS B, 1972. B. Efron, *The Efficiency of Cox's Likelihood
Function for Censored Data*, JASA, 1977. F. E. Harrell et al., *Evaluating the Yield of Medical Tests*, JAMA, 1982.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlearn.core.metric import Metric
from fedlearn.core.segments import Segments
from fedlearn.core.tasks.base import Task
from fedlearn.errors import DataError

MAX_PAIRS = 4_000_000  # pairs of examples in memory
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def survival_targets(y: np.ndarray) -> np.ndarray:
    """Return times and events ``(N, 2)`` as float32.

    Raises:
        DataError: a time is negative or not finite, or an event is neither 0 nor 1.
    """
    if y.ndim != 2 or y.shape[1] != 2:
        raise DataError(f"y has shape {y.shape}, expected (N, 2): the time and the event of each example")
    targets_N2 = y.astype(np.float32)
    if not np.isfinite(targets_N2[:, 0]).all() or targets_N2[:, 0].min(initial=0) < 0:
        raise DataError("y has a time that is negative or not finite\n  expected  times >= 0")
    if not np.isin(targets_N2[:, 1], (0, 1)).all():
        raise DataError("y has an event that is neither 0 nor 1\n  expected  1 for an event, 0 for a censored time")
    return targets_N2


def _pairs(segments: Segments, event_N: np.ndarray) -> Iterator[Pairs]:
    """Yield the pairs of an event and an example of the same segment, in blocks.

    Yields:
        The events of the block, the start of each event in the pairs, and the second examples ``(P,)``.
    """
    rows = np.flatnonzero(event_N)
    sizes = segments.sizes_K[segments.index_N[rows]]
    ends = np.cumsum(sizes)
    block = (ends - 1) // MAX_PAIRS if len(rows) else ends
    for number in np.unique(block):
        chosen = block == number
        size, starts = sizes[chosen], np.cumsum(sizes[chosen]) - sizes[chosen]
        first = segments.start_K[segments.index_N[rows[chosen]]]
        second = np.arange(size.sum()) - np.repeat(starts - first, size)
        yield rows[chosen], starts, second


def cox_losses(segments: Segments, outputs_NC: np.ndarray, targets_N2: np.ndarray) -> np.ndarray:
    """Return the negative log partial likelihood of each segment over its number of examples, ``(K,)``."""
    score_N, time_N, event_N = outputs_NC[:, 0], targets_N2[:, 0], targets_N2[:, 1] > 0
    is_real_N = (time_N > 0) | event_N
    loss_N = np.zeros(len(score_N))
    for rows, starts, second in _pairs(segments, event_N):
        first = np.repeat(rows, np.diff([*starts, len(second)]))
        at_risk = (time_N[second] >= time_N[first]) & is_real_N[second]
        tied = (time_N[second] == time_N[first]) & event_N[second]
        highest = np.maximum.reduceat(np.where(at_risk, score_N[second], -np.inf), starts)
        relative = np.exp(np.minimum(score_N[second] - np.repeat(highest, np.diff([*starts, len(second)])), 0.0))
        risk = np.add.reduceat(np.where(at_risk, relative, 0.0), starts)
        tied_risk = np.add.reduceat(np.where(tied, relative, 0.0), starts)
        count = np.add.reduceat(tied.astype(np.int64), starts)
        place = np.add.reduceat((tied & (second < first)).astype(np.int64), starts)
        loss_N[rows] = highest + np.log(risk - place / count * tied_risk) - score_N[rows]
    return segments.mean(loss_N)


def concordance(segments: Segments, outputs_NC: np.ndarray, targets_N2: np.ndarray) -> np.ndarray:
    """Return Harrell's C-index of each segment: the share of comparable pairs in the correct order.

    A pair is comparable if an event is earlier than the time of the other example, or at a censored time. Equal outputs
    count half. The value of a segment without a comparable pair is NaN.
    """
    score_N, time_N, event_N = outputs_NC[:, 0], targets_N2[:, 0], targets_N2[:, 1] > 0
    comparable_N, concordant_N = np.zeros(len(score_N)), np.zeros(len(score_N))
    for rows, starts, second in _pairs(segments, event_N):
        first = np.repeat(rows, np.diff([*starts, len(second)]))
        is_later = (time_N[second] > time_N[first]) | ((time_N[second] == time_N[first]) & ~event_N[second])
        merit = (score_N[first] > score_N[second]) + 0.5 * (score_N[first] == score_N[second])
        comparable_N[rows] = np.add.reduceat(is_later.astype(np.float64), starts)
        concordant_N[rows] = np.add.reduceat(np.where(is_later, merit, 0.0), starts)
    return np.asarray(segments.sum(concordant_N) / segments.sum(comparable_N))


def _example(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, 1)), np.array([[1.0, 0.0]])


SURVIVAL = Task(
    name="survival",
    metrics=(
        Metric(name="loss", whole=cox_losses, higher_is_better=False, is_stratified=True),
        Metric(name="c_index", whole=concordance),
    ),
    main_metric="c_index",
    targets=survival_targets,
    count_classes=lambda y: 1,
    strata=lambda y: np.asarray(y)[:, 1].astype(np.int64),
    couples_examples=True,
    example=_example,
)
