"""Agnostic federated learning: minimize the loss of the worst mixture of clients."""

import numpy as np

from fedlearn import Array, Context, LocalRule, Stage, State, Strategy, Transform, everyone, mean
from fedlearn.algorithm import lookup_values, update_values
from fedlearn.extend import array_namespace, is_number, require


def afl(*, learning_rate: float = 0.1) -> Strategy:
    """Solve ``min_w max_lambda sum_k lambda_k F_k(w)``, lambda in the simplex, by gradient steps in both.

    ``w <- w + sum_k lambda_k (w_k - w);  lambda <- P(lambda + learning_rate (F_1(w), ..., F_N(w)))``

    Each client computes and sends ``F_k``, the loss of the global model on its examples, at the cost of a pass.
    All clients take part in each round. Unlike in the paper, a client may take several local steps.

    Args:
        learning_rate: learning rate of lambda, >= 0; 0 is FedAvg with equal weights.

    *Guarantees*: at a fixed point, no client with ``lambda_k > 0`` has a smaller loss than another client.

    Reference: Mohri, Sivek, Suresh, *Agnostic Federated Learning*, ICML 2019, arXiv:1902.00146, section 4; with several
    local steps: Deng, Kamani, Mahdavi, *Distributionally Robust Federated Averaging*, NeurIPS 2020, arXiv:2102.12660.
    """
    is_valid = is_number(learning_rate, at_least=0)
    require(is_valid, "learning_rate", learning_rate, "a number >= 0", "learning_rate=0.1")

    def weigh(delta_KD: Array, state: State, context: Context) -> tuple[Array, State]:
        clients_N, lambda_N = (np.asarray(context.broadcast[name]) for name in ("clients", "weights"))
        factor_K = lookup_values(context.clients_K, clients_N, len(lambda_N) * lambda_N, default=1)
        xp = array_namespace(delta_KD)
        return xp.asarray(factor_K, dtype=delta_KD.dtype, device=delta_KD.device)[:, None] * delta_KD, state

    def ascend(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        lambda_K = lookup_values(context.clients_K, state["clients"], state["weights"], default=1 / context.num_clients)
        raised_K = lambda_K + learning_rate * context.metrics["loss/w_global"]
        raised = update_values(state, {"clients": context.clients_K, "weights": raised_K}, key="clients")
        return update_D, {**raised, "weights": project_onto_simplex(raised["weights"])}

    server = Transform(
        init=lambda layout: {"clients": np.zeros(0), "weights": np.zeros(0)}, update=ascend, broadcast=dict
    )
    stage = Stage(client=Transform(update=weigh), server=server)
    local = LocalRule(evaluate_models=("w_global",))
    return Strategy(select=everyone(), local=local, stages=(stage,), aggregate=mean(weighting="equal"))


def project_onto_simplex(weights_N: Array) -> Array:
    """Return the closest non-negative weights that add up to one.

    >>> project_onto_simplex(np.array([0.9, 0.5, -1.0]))
    array([0.7, 0.3, 0. ])

    Reference: Duchi, Shalev-Shwartz, Singer, Chandra, *Efficient Projections onto the l1-Ball*, ICML 2008, figure 1.
    """
    descending_N = np.sort(weights_N)[::-1]
    excess_N = (np.cumsum(descending_N) - 1) / np.arange(1, len(weights_N) + 1)
    return np.maximum(weights_N - excess_N[np.flatnonzero(descending_N > excess_N)[-1]], 0)
