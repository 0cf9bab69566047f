"""q-FedAvg: clients with a larger loss get a larger weight."""

import numpy as np

from fedlearn import Aggregator, LocalRule, State, Strategy, Updates, uniform
from fedlearn.extend import add_rows, add_totals, array_namespace, as_numpy, divide_total, is_number, require


def qfedavg(*, q: float = 1.0, lipschitz: float = 10.0, clients_per_round: int | None = None) -> Strategy:
    """Minimize ``sum_k F_k^(q + 1) / (q + 1)``, the objective of fair resource allocation.

    ``w <- w + sum_k F_k^q L (w_k - w) / sum_k (L F_k^q + q F_k^(q - 1) ||L (w_k - w)||^2)``, ``F_k = F_k(w)``

    Each client computes and sends ``F_k``, the loss of the global model on its examples, at the cost of a pass.

    Args:
        q: fairness, >= 0; 0 is FedAvg with equal weights. Larger values are fairer and converge more slowly.
        lipschitz: L, > 0; use 1 / local.learning_rate.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: a larger q makes the losses of clients more uniform.

    Reference: Li, Sanjabi, Beirami, Smith, *Fair Resource Allocation in Federated Learning*, ICLR 2020,
    arXiv:1905.10497, Algorithm 2.
    """
    require(is_number(q, at_least=0), "q", q, "a number >= 0; 0 is FedAvg", "q=1.0")
    require(is_number(lipschitz, at_least=0) and lipschitz > 0, "lipschitz", lipschitz, "a number > 0", "lipschitz=10")

    def add(partial: State, updates: Updates) -> State:
        xp = array_namespace(updates.delta_KD)
        square_K = as_numpy(xp.sum(updates.delta_KD**2, axis=-1)).astype(float)
        loss_K = np.maximum(updates.metrics["loss/w_global"].client_means(), 1e-10)
        h_K = loss_K**q + q * loss_K ** (q - 1) * lipschitz * square_K
        total = add_rows(partial["total"], updates.delta_KD, loss_K**q)
        return {"total": total, "h": partial["h"] + float(h_K.sum())}

    def merge(first: State, second: State) -> State:
        return {"total": add_totals(first["total"], second["total"]), "h": first["h"] + second["h"]}

    aggregate = Aggregator(
        init=lambda layout: {"total": None, "h": 0.0},
        add=add,
        finalize=lambda partial: divide_total(partial["total"], partial["h"]),
        merge=merge,
    )
    return Strategy(
        select=uniform(clients_per_round), local=LocalRule(evaluate_models=("w_global",)), aggregate=aggregate
    )
