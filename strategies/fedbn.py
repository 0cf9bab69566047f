"""FedBN: normalisation layers stay at the clients."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import parameter_patterns


def fedbn(
    *,
    personal_parameters: str | tuple[str, ...] = "*norm*",
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Clients whose features differ (scanners, devices) share all layers but those that normalise.

    ``w_l <- sum_k (n_k / n) w_k,l`` for every layer l but normalisation layers, which each client trains for itself

    Args:
        personal_parameters: patterns of the names of normalisation layers' parameters.
        clients_per_round: cohort size, drawn uniformly; None takes everyone.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: what stays is in no update; each client is evaluated with its own. Of group and layer norm that are
    scales and shifts; of batch norm the running statistics too, whatever the setting ``buffers`` says of others.

    Reference: Li, Jiang, Zhang, Kamp, Dou, *FedBN: Federated Learning on Non-IID Features via Local Batch
    Normalization*, ICLR 2021, arXiv:2102.07623, Algorithm 1.
    """
    return Strategy(
        select=uniform(clients_per_round),
        local=LocalRule(personal_parameters=parameter_patterns(personal_parameters)),
        aggregate=mean(weighting=weighting),
    )
