"""FedAdagrad: an adaptive server optimizer."""

from fedlearn import Array, Strategy, adaptive, mean, uniform


def fedadagrad(
    *,
    learning_rate: float = 0.1,
    beta1: float = 0.0,
    tau: float = 0.001,
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Take Adagrad steps at the server along the mean update ``delta``, without bias correction.

    ``m <- beta1 m + (1 - beta1) delta;  v <- v + delta^2;``
    ``w <- w + learning_rate m / (sqrt(v) + tau)``

    Args:
        learning_rate: server learning rate, >= 0.
        beta1: decay of the first moment, in [0, 1).
        tau: degree of adaptivity, > 0; the second moment starts at tau^2.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, arXiv:2003.00295, Algorithm 2.
    """

    def second_moment(v_D: Array, delta_D: Array) -> Array:
        return v_D + delta_D**2

    return Strategy(
        select=uniform(clients_per_round),
        aggregate=mean(weighting=weighting),
        server=adaptive(second_moment, learning_rate=learning_rate, beta1=beta1, tau=tau),
    )
