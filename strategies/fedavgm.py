"""FedAvgM: federated averaging with server momentum."""

from fedlearn import Strategy, mean, sgd, uniform


def fedavgm(
    *,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Move along the mean update with momentum: ``v <- momentum v + delta; w <- w + learning_rate v``.

    Args:
        learning_rate: server learning rate, >= 0.
        momentum: server momentum, in [0, 1).
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Hsu, Qi, Brown, *Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification*, 2019, arXiv:1909.06335.
    """
    return Strategy(
        select=uniform(clients_per_round),
        aggregate=mean(weighting=weighting),
        server=sgd(learning_rate, momentum=momentum),
    )
