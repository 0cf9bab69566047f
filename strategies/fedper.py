"""FedPer: a shared base, and a personal head at each client."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import parameter_patterns


def fedper(
    *,
    personal_parameters: str | tuple[str, ...] = "out.*",
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Train a shared base and a personal head: ``W_B <- sum_k (n_k / n) W_B,k``; ``W_P,k`` stays at client k.

    Args:
        personal_parameters: name patterns of the parameters that stay at the clients; all others are shared.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: no update contains personal parameters, and each client is evaluated with its own.

    Reference: Arivazhagan, Aggarwal, Singh, Choudhary, *Federated Learning with Personalization Layers*, 2019,
    arXiv:1912.00818, Algorithms 1 and 2.
    """
    return Strategy(
        select=uniform(clients_per_round),
        local=LocalRule(personal_parameters=parameter_patterns(personal_parameters)),
        aggregate=mean(weighting=weighting),
    )
