"""Define the task ``causal_lm``: predict the next token at each position of a text.

A network for this task returns three numbers per text:

- the total negative log-likelihood of the counted tokens
- the number of counted tokens that it predicts correctly
- the number of counted tokens

So an evaluation never holds the logits of all texts. The target of an example is its number of counted tokens.

Shapes: N texts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlearn.core.metric import Metric, Sums, divide_sums
from fedlearn.core.tasks.base import Task
from fedlearn.errors import DataError

NUM_OUTPUTS = 3  # total negative log-likelihood, correct tokens, counted tokens
SUMS = ("nll", "correct", "tokens")


def _sums(outputs_N3: np.ndarray, targets_N: np.ndarray) -> Sums:
    return {name: outputs_N3[:, column] for column, name in enumerate(SUMS)}


def _loss(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return divide_sums(totals, "nll", "tokens")


def _perplexity(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.exp(divide_sums(totals, "nll", "tokens"))


def _accuracy(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return divide_sums(totals, "correct", "tokens")


def _token_counts(y: np.ndarray) -> np.ndarray:
    """Return the numbers of counted tokens as int64, after a check."""
    counts_N = y.astype(np.int64)
    if y.ndim != 1 or not np.array_equal(counts_N, y) or counts_N.min(initial=0) < 0:
        raise DataError("y has other values than numbers of tokens")
    return counts_N


CAUSAL_LM = Task(
    name="causal_lm",
    metrics=(
        Metric(name="loss", sums=_sums, finish=_loss, higher_is_better=False),
        Metric(name="perplexity", sums=_sums, finish=_perplexity, higher_is_better=False),
        Metric(name="accuracy", sums=_sums, finish=_accuracy),
    ),
    main_metric="perplexity",
    targets=_token_counts,
    count_classes=lambda y: 1,
    num_outputs=lambda num_classes: NUM_OUTPUTS,
    strata=lambda y: np.zeros(len(y), np.int64),
)
