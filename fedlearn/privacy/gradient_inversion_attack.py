"""What a server can read from updates: the attacks that protection is for, as arithmetic.

Shapes: B victims, F inputs and O outputs of an affine layer, C classes; M models, N examples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EPS = 1e-12
MIN_MODELS_PER_SIDE = 2  # models on either side of an example, for a mean and a spread


class Roc(NamedTuple):
    """How well scores tell members from others.

    Attributes:
        fpr, tpr: shares of others and of members above each threshold, ascending.
        auc: area under the curve; 0.5 tells nothing.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    auc: float

    def tpr_at(self, fpr: float) -> float:
        """Share of members found where at most this share of others is taken for members."""
        return float(self.tpr[np.searchsorted(self.fpr, fpr, side="right") - 1])


def reconstruct_inputs(weights_BOF: np.ndarray, biases_BO: np.ndarray) -> np.ndarray:
    """The input of an affine layer, from the gradients of its weight and bias on one example: ``(B, F)``.

    The gradients are ``d x^T`` and ``d``, whatever the loss and the layers behind: ``x = W^T d / |d|^2``, which is
    exact without noise, and with noise on the weight the estimate of least squares.

    Reference: Phong, Aono, Hayashi, Wang, Moriai, *Privacy-Preserving Deep Learning via Additively Homomorphic
    Encryption*, IEEE TIFS 2018; Geiping, Bauermeister, Dröge, Moeller, *Inverting Gradients*, NeurIPS 2020,
    arXiv:2003.14053, Proposition 3.1.
    """
    squared_B1 = np.square(biases_BO).sum(axis=1, keepdims=True)
    inputs_BF: np.ndarray = np.einsum("bof,bo->bf", weights_BOF, biases_BO) / np.maximum(squared_B1, EPS)
    return inputs_BF


def reconstruct_labels(biases_BC: np.ndarray) -> np.ndarray:
    """The class of one example, from the gradient of the last bias: ``(B,)``.

    It is ``softmax - one_hot``, whose only negative number is the one of the true class.

    Reference: Zhao, Mopuri, Bilen, *iDLG: Improved Deep Leakage from Gradients*, 2020, arXiv:2001.02610.
    """
    return np.argmin(biases_BC, axis=1)


def pearson_correlation(first_BF: np.ndarray, second_BF: np.ndarray) -> np.ndarray:
    """Pearson's, row by row; 0 for a constant row."""
    a_BF, b_BF = (rows - rows.mean(axis=1, keepdims=True) for rows in (first_BF, second_BF))
    norms_B = np.linalg.norm(a_BF, axis=1) * np.linalg.norm(b_BF, axis=1)
    return (a_BF * b_BF).sum(axis=1) / np.maximum(norms_B, EPS)


def confidence(outputs_NC: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """``log(p / (1 - p))`` of the probability that a model gives the true class: ``(N,)``.

    Args:
        outputs_NC: logits; one column for a binary task.
        y_N: true classes.
    """
    outputs_NC = np.asarray(outputs_NC, np.float64)
    if outputs_NC.shape[1] == 1:
        return np.where(y_N == 1, outputs_NC[:, 0], -outputs_NC[:, 0])
    rows = np.arange(len(y_N))
    others_NC = outputs_NC.copy()
    others_NC[rows, y_N] = -np.inf
    largest_N1 = others_NC.max(axis=1, keepdims=True)
    rest_N = largest_N1[:, 0] + np.log(np.exp(others_NC - largest_N1).sum(axis=1))
    return outputs_NC[rows, y_N] - rest_N


def lira(confidence_MN: np.ndarray, member_MN: np.ndarray) -> np.ndarray:
    """The likelihood ratio attack, each model in turn being the target and the others its shadows: scores ``(M, N)``.

    For each example, confidences of models trained with it and of those trained without it are two Gaussians; the score
    is the target's log likelihood ratio. Spreads are shared by all examples, as few models cannot tell them apart.

    Args:
        confidence_MN: of each model on each example, see `confidence`.
        member_MN: whether the model was trained on the example.

    Reference: Carlini, Chien, Nasr, Song, Terzis, Tramèr, *Membership Inference Attacks From First Principles*, IEEE
    S&P 2022, arXiv:2112.03570.
    """
    ratios = [_against_others(confidence_MN, member_MN, target) for target in range(len(confidence_MN))]
    return np.stack(ratios)


def _against_others(confidence_MN: np.ndarray, member_MN: np.ndarray, target: int) -> np.ndarray:
    others = np.arange(len(confidence_MN)) != target
    seen_N, shadows_MN, member_MN = confidence_MN[target], confidence_MN[others], member_MN[others]
    likelihoods = [_log_likelihood(seen_N, shadows_MN, side_MN) for side_MN in (member_MN, ~member_MN)]
    enough_N = np.minimum(member_MN.sum(axis=0), (~member_MN).sum(axis=0)) >= MIN_MODELS_PER_SIDE
    return np.where(enough_N, likelihoods[0] - likelihoods[1], 0.0)


def _log_likelihood(seen_N: np.ndarray, shadows_MN: np.ndarray, side_MN: np.ndarray) -> np.ndarray:
    counts_N = np.maximum(side_MN.sum(axis=0), 1)
    mean_N = (shadows_MN * side_MN).sum(axis=0) / counts_N
    squares = (np.square(shadows_MN - mean_N) * side_MN).sum() / max(1, side_MN.sum() - len(counts_N))
    variance = max(float(squares), EPS)
    return -np.square(seen_N - mean_N) / (2 * variance) - 0.5 * np.log(variance)


def roc(scores: np.ndarray, member: np.ndarray) -> Roc:
    """Of scores of any shape, of which more means member."""
    from sklearn.metrics import roc_auc_score, roc_curve

    fpr, tpr, _ = roc_curve(member.ravel(), scores.ravel(), drop_intermediate=False)
    return Roc(fpr, tpr, float(roc_auc_score(member.ravel(), scores.ravel())))
