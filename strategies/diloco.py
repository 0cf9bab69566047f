"""DiLoCo: many local steps of AdamW, and Nesterov momentum at the server."""

from fedlearn import Strategy, mean, sgd, uniform


def diloco(
    *,
    learning_rate: float = 0.7,
    momentum: float = 0.9,
    clients_per_round: int | None = None,
    weighting: str = "equal",
) -> Strategy:
    """Move along the mean update with Nesterov momentum: ``v <- momentum v + delta; w <- w + lr (delta + momentum v)``.

    The paper trains H local steps of AdamW, and keeps its state: ``local.optimizer=adamw local.steps=500
    local.optimizer_state=keep``.

    Args:
        learning_rate: outer learning rate, >= 0.
        momentum: outer momentum, in [0, 1).
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: with learning rate 1 and momentum 0, it is FedAvg with the local optimizer.

    Reference: Douillard, Feng, Rusu, Chhaparia, Donchev, Kuncoro, Ranzato, Szlam, Shen, *DiLoCo: Distributed
    Low-Communication Training of Language Models*, 2023, arXiv:2311.08105, Algorithm 1.
    """
    return Strategy(
        select=uniform(clients_per_round),
        aggregate=mean(weighting=weighting),
        server=sgd(learning_rate, momentum=momentum, nesterov=True),
    )
