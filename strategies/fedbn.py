"""FedBN: normalization layers stay at the clients."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import parameter_patterns


def fedbn(
    *,
    personal_parameters: str | tuple[str, ...] = "*norm*",
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Share all layers except normalization layers, for clients with different features (scanners, devices).

    ``w_l <- sum_k (n_k / n) w_k,l`` for each layer l, except normalization layers. They stay at the clients.

    Args:
        personal_parameters: name patterns of the parameters of normalization layers.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: no update contains personal parameters, and each client is evaluated with its own. The personal
    parameters are the scales and shifts of group and layer norm. For batch norm they include the running statistics,
    under any ``buffers`` policy.

    Reference: Li, Jiang, Zhang, Kamp, Dou, *FedBN: Federated Learning on Non-IID Features via Local Batch
    Normalization*, ICLR 2021, arXiv:2102.07623, Algorithm 1.
    """
    return Strategy(
        select=uniform(clients_per_round),
        local=LocalRule(personal_parameters=parameter_patterns(personal_parameters)),
        aggregate=mean(weighting=weighting),
    )
