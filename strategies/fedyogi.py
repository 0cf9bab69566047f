"""FedYogi: an adaptive server optimizer."""

from fedlearn import Array, Strategy, adaptive, mean, uniform
from fedlearn.extend import array_namespace, is_number, require


def fedyogi(
    *,
    learning_rate: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 0.001,
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Take Yogi steps at the server along the mean update ``delta``, without bias correction.

    ``m <- beta1 m + (1 - beta1) delta;  v <- v - (1 - beta2) delta^2 sign(v - delta^2);``
    ``w <- w + learning_rate m / (sqrt(v) + tau)``

    Args:
        learning_rate: server learning rate, >= 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        tau: degree of adaptivity, > 0; the second moment starts at tau^2.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, arXiv:2003.00295, Algorithm 2.
    """
    require(is_number(beta2, at_least=0, below=1), "beta2", beta2, "in [0, 1)", "beta2=0.99")

    def second_moment(v_D: Array, delta_D: Array) -> Array:
        xp = array_namespace(v_D)
        return v_D - (1 - beta2) * delta_D**2 * xp.sign(v_D - delta_D**2)

    return Strategy(
        select=uniform(clients_per_round),
        aggregate=mean(weighting=weighting),
        server=adaptive(second_moment, learning_rate=learning_rate, beta1=beta1, tau=tau),
    )
