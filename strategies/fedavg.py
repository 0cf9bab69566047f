"""FedAvg: federated averaging of local models."""

from fedlearn import Strategy, mean
from fedlearn.algorithm import get_selector


def fedavg(*, clients_per_round: int | None = None, weighting: str = "examples", select: str = "uniform") -> Strategy:
    """Move the global model to the mean of the clients' models.

    ``w <- w + sum_k (n_k / n) (w_k - w)``

    Args:
        clients_per_round: cohort size; None selects all clients.
        weighting: ``examples`` (in proportion to the training examples n_k) or ``equal``.
        select: ``uniform``, ``poisson`` (``clients_per_round`` is the expected size), ``weighted`` (by training
            examples; use it with ``weighting=equal``) ``round_robin`` or ``cyclic`` (a new random order in each cycle).

    Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, *Communication-Efficient Learning of Deep Networks from
    Decentralized Data*, AISTATS 2017, arXiv:1602.05629.
    """
    return Strategy(select=get_selector(select, clients_per_round), aggregate=mean(weighting=weighting))
