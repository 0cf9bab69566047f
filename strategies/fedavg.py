"""FedAvg: federated averaging of local models."""

from fedlearn import Strategy, mean
from fedlearn.algorithm import get_selector


def fedavg(*, clients_per_round: int | None = None, weighting: str = "examples", select: str = "uniform") -> Strategy:
    """Move the global model to the mean of the clients' models.

    ``w <- w + sum_k (n_k / n) (w_k - w)``

    Args:
        clients_per_round: cohort size; None takes everyone.
        weighting: ``examples`` (n_k training examples count n_k-fold) or ``equal``.
        select: ``uniform``, ``poisson`` (cohorts of that size on average), ``weighted`` (by training examples, which
            goes with ``weighting=equal``) or ``round_robin``.

    Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, *Communication-Efficient Learning of Deep Networks from
    Decentralized Data*, AISTATS 2017, arXiv:1602.05629.
    """
    return Strategy(select=get_selector(select, clients_per_round), aggregate=mean(weighting=weighting))
