"""FedBuff: the server steps as soon as its buffer holds enough updates of any client and any staleness."""

from fedlearn import Strategy, everyone, mean, sgd
from fedlearn.algorithm import Asynchrony, polynomial


def fedbuff(
    *,
    buffer_size: int = 3,
    concurrency: int = 10,
    exponent: float = 0.5,
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    weighting: str = "equal",
) -> Strategy:
    """Update after K updates: ``w <- w + learning_rate / K sum_k s(tau_k) delta_k``, ``s(tau) = (1 + tau)^-exponent``.

    ``tau_k`` counts the server's steps since client k got its model. With a buffer as large as the population, equally
    fast clients and ``exponent=0`` it is FedAvg.

    Args:
        buffer_size: K, >= 1.
        concurrency: clients at work at a time, >= 1; all where there are fewer.
        exponent: >= 0; 0 counts all the same.
        learning_rate: of the server, >= 0.
        momentum: of the server, in [0, 1).
        weighting: ``equal``, as in the paper, or ``examples``.

    Reference: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, *Federated Learning with Buffered Asynchronous
    Aggregation*, AISTATS 2022, arXiv:2106.06639, Algorithm 1.
    """
    return Strategy(
        select=everyone(),
        aggregate=mean(weighting=weighting),
        server=sgd(learning_rate, momentum=momentum),
        asynchrony=Asynchrony(buffer_size=buffer_size, concurrency=concurrency, staleness_weight=polynomial(exponent)),
    )
