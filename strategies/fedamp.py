"""FedAMP: the server sends each client a mixture of client models, with large weights for similar clients."""

import numpy as np

from fedlearn import Array, Context, State, Strategy, Updates, proximal, stacked, uniform
from fedlearn.algorithm import PersonalModel
from fedlearn.extend import as_numpy, is_number, require
from fedlearn.robust import squared_distances


def fedamp(
    *, alpha: float = 1.0, sigma: float = 10.0, penalty: float = 0.1, clients_per_round: int | None = None
) -> Strategy:
    """Send client i the model ``u_i`` with attention to similar clients; its personal model ``w_i`` stays close to it.

    ``u_i = w_i + sum_{j != i} xi_ij (w_j - w_i);  xi_ij = (alpha / sigma) e^(-||w_i - w_j||^2 / sigma);``
    ``w_i = argmin_w F_i(w) + penalty / (2 alpha) ||w - u_i||^2``

    Clients start at ``u_i``. A client that has sent no model yet receives the mean of all models, the global model.
    The weights of a client are scaled down if their sum is above one, so that ``u_i`` is in the convex hull.

    Args:
        alpha: step size of the attention, > 0.
        sigma: squared distance of models at which the attention is ``1 / e`` of its maximum, > 0.
        penalty: lambda, >= 0. Training diverges if local.learning_rate is above ``2 alpha / penalty``.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: the server keeps one model per client, and each client receives one model per round.

    Reference: Huang, Chu, Zhou, Wang, Liu, Pei, Zhang, *Personalized Cross-Silo Federated Learning on Non-IID Data*,
    AAAI 2021, arXiv:2007.03797, Algorithm 1.
    """
    for name, number in (("alpha", alpha), ("sigma", sigma)):
        is_positive = is_number(number, at_least=0) and 0 < number < float("inf")
        require(is_positive, name, number, "a finite number > 0", f"{name}=1.0")
    require(is_number(penalty, at_least=0), "penalty", penalty, "a number >= 0", "penalty=0.1")

    def mix(state: State, cohort: tuple[int, ...]) -> dict[int, Array]:
        known, rows, _ = np.intersect1d(state["clients"], cohort, assume_unique=True, return_indices=True)
        if not len(known):
            return {}
        weights_MM = attention(squared_distances(state["models"]), alpha=alpha, sigma=sigma)
        return dict(zip(known.tolist(), weights_MM[rows].astype(np.float32) @ state["models"], strict=True))

    def remember(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        models_KD = context.received_KD + as_numpy(updates.delta_KD)
        absent = ~np.isin(state["clients"], updates.clients_K)
        clients_M = np.concatenate([state["clients"][absent], updates.clients_K])
        models_MD = np.concatenate([state["models"][absent], models_KD]) if absent.any() else models_KD
        order_M = np.argsort(clients_M)
        state = {"clients": clients_M[order_M], "models": models_MD[order_M]}
        return state["models"].mean(axis=0, dtype=np.float64).astype(np.float32) - context.shared_D, state

    aggregate = stacked(
        remember,
        init=lambda layout: {
            "clients": np.zeros(0, np.int64),
            "models": np.zeros((0, layout.num_parameters), np.float32),
        },
        reads=("clients_K",),
        client_models=mix,
    )
    local = proximal(penalty / alpha)._replace(personal=PersonalModel())
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=aggregate)


def attention(distances_MM: np.ndarray, *, alpha: float, sigma: float) -> np.ndarray:
    """Return the weights of the models in each mixture, M x M; rows add up to one.

    >>> attention(np.array([[0.0, 1.0, 9.0], [1.0, 0.0, 9.0], [9.0, 9.0, 0.0]]), alpha=0.5, sigma=1.0).round(3)
    array([[0.816, 0.184, 0.   ],
           [0.184, 0.816, 0.   ],
           [0.   , 0.   , 1.   ]])

    Args:
        distances_MM: squared distances between models.
        alpha: step size.
        sigma: scale of the squared distances.
    """
    weights_MM = alpha / sigma * np.exp(-distances_MM / sigma)
    np.fill_diagonal(weights_MM, 0)
    weights_MM /= np.maximum(1, weights_MM.sum(axis=1, keepdims=True))
    return weights_MM + np.diag(1 - weights_MM.sum(axis=1))
