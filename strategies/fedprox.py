"""FedProx: federated averaging with a proximal term at the clients."""

from fedlearn import Strategy, mean, proximal, uniform
from fedlearn.extend import is_number, require


def fedprox(*, mu: float = 0.1, clients_per_round: int | None = None, weighting: str = "examples") -> Strategy:
    """Run FedAvg with clients that minimize ``F_k(w) + mu / 2 ||w - w_global||^2``.

    Args:
        mu: weight of the proximal term, >= 0; 0 is FedAvg.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, *Federated Optimization in Heterogeneous Networks*, MLSys
    2020, arXiv:1812.06127.
    """
    require(is_number(mu, at_least=0), "mu", mu, "a number >= 0; 0 is FedAvg", "mu=0.1")
    return Strategy(select=uniform(clients_per_round), local=proximal(mu), aggregate=mean(weighting=weighting))
