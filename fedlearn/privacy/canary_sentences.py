"""Measure the memorization of a language model by canary sentences: texts with random tokens in the training data.

A model has memorized a canary if its loss on the canary is smaller than on most other texts of the same form. The
exposure of a canary is ``log2(R + 1) - log2(rank)``. The rank counts the canary and R candidates that were not in the
training data, in order of their losses. A model that has not seen the canaries has a mean exposure of 1.44 bits.

Reference: Carlini, Liu, Erlingsson, Kos, Song, *The Secret Sharer: Evaluating and Testing Unintended Memorization in
Neural Networks*, USENIX Security 2019, arXiv:1802.08232, Section 4.

Shapes: M canaries, R candidates of each canary, N examples, T tokens, S secret tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlearn.core.records import Examples
from fedlearn.core.tasks import Task
from fedlearn.errors import require

IDS, MASK, LABELS, IGNORED = "input_ids", "attention_mask", "labels", -100  # fields of the inputs, as in transformers
NUM_SECRETS = 6  # random tokens of a canary
BASELINE = 1 / np.log(2)  # mean exposure without memorization, bits


@dataclass(frozen=True, kw_only=True)
class CanarySentences:
    """Canaries and their candidates.

    Attributes:
        canaries: the sentences that join the training data, M examples.
        candidates: sentences with other secrets, M times R examples; the ones of a canary follow each other.
    """

    canaries: Examples
    candidates: Examples

    @property
    def num_candidates(self) -> int:
        """Number R of candidates of each canary."""
        return len(self.candidates) // len(self.canaries)

    def insert(self, examples: Examples, index: int, copies: int) -> Examples:
        """Return the examples of a client with copies of one canary.

        Args:
            examples: training examples of the client.
            index: number of the canary.
            copies: number of copies, >= 1.
        """
        rows = np.full(copies, index)
        x = np.concatenate([examples.x, self.canaries.x[rows]])
        return Examples(x, np.concatenate([examples.y, self.canaries.y[rows]]))


def draw_sentences(
    examples: Examples, *, num_canaries: int, num_candidates: int, rng: np.random.Generator
) -> CanarySentences:
    """Draw canaries: real texts whose last tokens are replaced by random tokens of the data.

    Args:
        examples: training examples with token ids; the targets of the canaries are the ones of their texts.
        num_canaries: M.
        num_candidates: R.
        rng: generator for the draws.

    Raises:
        SettingError: The inputs have no token ids, or too few texts are long enough.
    """
    names = examples.x.dtype.names or ()
    has_tokens = IDS in names and MASK in names
    require(has_tokens, "audit.sentences", num_canaries, "0: the inputs are no token ids", "audit.sentences=0")
    long_N = np.flatnonzero(examples.x[MASK].sum(axis=1) >= NUM_SECRETS + 3)
    expected = f"at most {len(long_N)}, the number of texts with {NUM_SECRETS + 3} tokens or more"
    require(num_canaries <= len(long_N), "audit.sentences", num_canaries, expected, "audit.sentences=1")
    rows_M = rng.choice(long_N, num_canaries, replace=False)
    ids, counts = np.unique(examples.x[IDS][examples.x[MASK] > 0], return_counts=True)
    known = ids[np.argsort(counts)[: max(2, len(ids) - NUM_SECRETS)]]  # without the few most frequent, special tokens
    repeated = np.repeat(rows_M, num_candidates + 1)
    x, y = examples.x[repeated].copy(), examples.y[repeated]
    secrets = rng.choice(known, (len(x), NUM_SECRETS))
    first = x[MASK].sum(axis=1)[:, None] - 1 - NUM_SECRETS  # the last token of a text is its end
    places = first + np.arange(NUM_SECRETS)
    np.put_along_axis(x[IDS], places, secrets.astype(x[IDS].dtype), axis=1)
    if LABELS in names:
        counted = np.take_along_axis(x[LABELS], places, axis=1) != IGNORED
        labels = np.where(counted, secrets, IGNORED).astype(x[LABELS].dtype)
        np.put_along_axis(x[LABELS], places, labels, axis=1)
    is_canary = np.arange(len(x)) % (num_candidates + 1) == 0
    return CanarySentences(
        canaries=Examples(x[is_canary], y[is_canary]), candidates=Examples(x[~is_canary], y[~is_canary])
    )


def exposures(canary_M: np.ndarray, candidate_MR: np.ndarray) -> np.ndarray:
    """Return the exposure of each canary from the losses, in bits; equal losses count in full.

    >>> exposures(np.array([0.1, 9.0]), np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])).tolist()
    [2.0, 0.0]
    """
    rank_M = 1 + np.sum(candidate_MR <= canary_M[:, None], axis=1)
    return np.log2(candidate_MR.shape[1] + 1) - np.log2(rank_M)


def example_losses(outputs: np.ndarray, y: np.ndarray, task: Task) -> np.ndarray:
    """Return the loss of each example from the outputs of a text model.

    Args:
        outputs: outputs of the model: logits per text, or the three sums of ``causal_lm``.
        y: targets.
        task: ``binary``, ``multiclass`` or ``causal_lm``.

    Raises:
        SettingError: The task is another one.
    """
    fix, outputs = "audit.sentences=0", outputs.astype(np.float64)
    if task.name == "causal_lm":
        return np.asarray(outputs[:, 0] / np.maximum(outputs[:, 2], 1))
    require(task.name in ("binary", "multiclass"), "audit.sentences", task.name, "a task with texts and classes", fix)
    if task.name == "binary":
        return np.logaddexp(0, (1 - 2 * y) * outputs[:, 0])
    losses: np.ndarray = np.logaddexp.reduce(outputs, axis=1) - outputs[np.arange(len(y)), y.astype(np.int64)]
    return losses
