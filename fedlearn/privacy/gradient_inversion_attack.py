"""Privacy attacks on updates and models: gradient inversion and membership inference, as array functions.

Shapes: B victims, F inputs and O outputs of an affine layer, C classes; M models, N examples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EPS = 1e-12
MIN_MODELS_PER_SIDE = 2  # models with and models without an example, for a mean and a variance


class Roc(NamedTuple):
    """ROC curve of membership scores.

    Attributes:
        fpr: share of non-members above each threshold, in [0, 1], ascending.
        tpr: share of members above each threshold, in [0, 1], ascending.
        auc: area under the curve, in [0, 1]; 0.5 for random guesses.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    auc: float

    def tpr_at(self, fpr: float) -> float:
        """Return the true positive rate at a false positive rate of at most ``fpr``, in [0, 1]."""
        return float(self.tpr[np.searchsorted(self.fpr, fpr, side="right") - 1])


def reconstruct_inputs(weights_BOF: np.ndarray, biases_BO: np.ndarray) -> np.ndarray:
    """Return the input of an affine layer, from the gradients of its weight and bias on one example.

    For any loss and any later layers, the gradients are ``d x^T`` and ``d``. So ``x = W^T d / |d|^2``. This is exact
    without noise; with noise on the weight gradient it is the least-squares estimate.

    Args:
        weights_BOF: gradients of the weight, ``(B, O, F)``.
        biases_BO: gradients of the bias, ``(B, O)``.

    Returns:
        Inputs of the layer, ``(B, F)``.

    Reference: Phong, Aono, Hayashi, Wang, Moriai, *Privacy-Preserving Deep Learning via Additively Homomorphic
    Encryption*, IEEE TIFS 2018; Geiping, Bauermeister, Dröge, Moeller, *Inverting Gradients*, NeurIPS 2020,
    arXiv:2003.14053, Proposition 3.1.
    """
    squared_B1 = np.square(biases_BO).sum(axis=1, keepdims=True)
    inputs_BF: np.ndarray = np.einsum("bof,bo->bf", weights_BOF, biases_BO) / np.maximum(squared_B1, EPS)
    return inputs_BF


def reconstruct_labels(biases_BC: np.ndarray) -> np.ndarray:
    """Return the class of one example, from the gradient of the last bias.

    The gradient is ``softmax - one_hot``. Only its entry of the true class is negative.

    Args:
        biases_BC: gradients of the last bias, ``(B, C)``.

    Returns:
        Classes, ``(B,)``.

    Reference: Zhao, Mopuri, Bilen, *iDLG: Improved Deep Leakage from Gradients*, 2020, arXiv:2001.02610.
    """
    return np.argmin(biases_BC, axis=1)


def pearson_correlation(first_BF: np.ndarray, second_BF: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each pair of rows, ``(B,)``; 0 for a constant row."""
    a_BF, b_BF = (rows - rows.mean(axis=1, keepdims=True) for rows in (first_BF, second_BF))
    norms_B = np.linalg.norm(a_BF, axis=1) * np.linalg.norm(b_BF, axis=1)
    return (a_BF * b_BF).sum(axis=1) / np.maximum(norms_B, EPS)


def confidence(outputs_NC: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """Return ``log(p / (1 - p))`` of the predicted probability p of the true class, ``(N,)``.

    Args:
        outputs_NC: logits, ``(N, C)``; one column for a binary task.
        y_N: true classes, ``(N,)``.
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
    """Return the scores of the likelihood ratio attack, ``(M, N)``; higher scores mean membership.

    Each model in turn is the target, and the other models are its shadow models. For each example, the confidences of
    shadow models trained with it and without it are modelled as two Gaussians. The score is the log likelihood ratio of
    the target. All examples share one variance per side, because few models cannot estimate it for each example.

    Args:
        confidence_MN: confidence of each model on each example, ``(M, N)``; see `confidence`.
        member_MN: True if the model was trained on the example, ``(M, N)``.

    Reference: Carlini, Chien, Nasr, Song, Terzis, Tramèr, *Membership Inference Attacks From First Principles*, IEEE
    S&P 2022, arXiv:2112.03570.
    """
    ratios = [_against_others(confidence_MN, member_MN, target) for target in range(len(confidence_MN))]
    return np.stack(ratios)


def _against_others(confidence_MN: np.ndarray, member_MN: np.ndarray, target: int) -> np.ndarray:
    others = np.arange(len(confidence_MN)) != target
    target_N, shadows_MN, member_MN = confidence_MN[target], confidence_MN[others], member_MN[others]
    likelihoods = [_log_likelihood(target_N, shadows_MN, side_MN) for side_MN in (member_MN, ~member_MN)]
    enough_N = np.minimum(member_MN.sum(axis=0), (~member_MN).sum(axis=0)) >= MIN_MODELS_PER_SIDE
    return np.where(enough_N, likelihoods[0] - likelihoods[1], 0.0)


def _log_likelihood(target_N: np.ndarray, shadows_MN: np.ndarray, side_MN: np.ndarray) -> np.ndarray:
    counts_N = np.maximum(side_MN.sum(axis=0), 1)
    mean_N = (shadows_MN * side_MN).sum(axis=0) / counts_N
    squares = (np.square(shadows_MN - mean_N) * side_MN).sum() / max(1, side_MN.sum() - len(counts_N))
    variance = max(float(squares), EPS)
    return -np.square(target_N - mean_N) / (2 * variance) - 0.5 * np.log(variance)


def roc(scores: np.ndarray, member: np.ndarray) -> Roc:
    """Return the ROC curve of membership scores.

    Args:
        scores: scores of any shape; higher scores mean membership.
        member: True for members, same shape.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    fpr, tpr, _ = roc_curve(member.ravel(), scores.ravel(), drop_intermediate=False)
    return Roc(fpr, tpr, float(roc_auc_score(member.ravel(), scores.ravel())))
