"""FedDecorr: a penalty on correlated features prevents the collapse of dimensions at clients."""

from fedlearn import Array, LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import Batch
from fedlearn.extend import array_namespace, is_number, require


def feddecorr(*, beta: float = 0.1, clients_per_round: int | None = None, weighting: str = "examples") -> Strategy:
    """Run FedAvg with the local loss ``CE + beta / d^2 ||K||_F^2``.

    ``K`` is the correlation matrix of the ``d`` features over the examples of a batch. Features are the inputs of the
    last layer.

    Args:
        beta: weight of the penalty, >= 0; 0 is FedAvg.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Shi, Liang, Zhang, Tan, Bai, *Towards Understanding and Mitigating Dimensional Collapse in Heterogeneous
    Federated Learning*, ICLR 2023, arXiv:2210.00226, equation 7.
    """
    require(is_number(beta, at_least=0), "beta", beta, "a number >= 0; 0 is FedAvg", "beta=0.1")

    def correlation(batch: Batch, w_global: Array) -> Array:
        xp, centered = array_namespace(batch.features), batch.features - batch.mean(batch.features)
        scaled = batch.zero_padding(centered / xp.sqrt(batch.mean(centered**2) + 1e-8))
        return beta * xp.mean((scaled.T @ scaled / batch.count) ** 2)

    local = LocalRule(penalty=correlation if beta else None, couples_examples=beta > 0)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
