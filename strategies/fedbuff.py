"""FedBuff: the server takes a step as soon as its buffer has K updates, of any client and staleness."""

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
    """Take a server step after each K updates, with weights that fall with staleness.

    ``w <- w + learning_rate / K sum_k s(tau_k) delta_k`` with ``s(tau) = (1 + tau)^-exponent``

    ``tau_k`` is the staleness: the number of server steps since client k received its model. With ``exponent=0``,
    equally fast clients and a buffer for all of them, it is FedAvg.

    Args:
        buffer_size: K, number of updates per server step, >= 1.
        concurrency: number of in-flight requests, >= 1; at most the number of clients.
        exponent: exponent of the staleness weight, >= 0; 0 gives equal weights.
        learning_rate: server learning rate, >= 0.
        momentum: server momentum, in [0, 1).
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
