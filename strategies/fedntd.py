"""FedNTD: clients keep the outputs of the global model for the classes that are not the target of an example."""

from fedlearn import Array, LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import Batch
from fedlearn.extend import array_namespace, is_number, log_softmax, require


def fedntd(
    *, beta: float = 1.0, tau: float = 1.0, clients_per_round: int | None = None, weighting: str = "examples"
) -> Strategy:
    """Run FedAvg with the local loss ``CE + beta KL(q_global || q)`` over the not-true classes.

    ``q`` is the softmax of ``logits / tau`` without the class of the example. Two classes give no penalty.

    Args:
        beta: weight of the distillation, >= 0; 0 is FedAvg.
        tau: temperature, > 0.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Lee, Jeong, Shin, Bae, Yun, *Preservation of the Global Knowledge by Not-True Distillation in Federated
    Learning*, NeurIPS 2022, arXiv:2106.03097, equations 3 and 4.
    """
    require(is_number(beta, at_least=0), "beta", beta, "a number >= 0; 0 is FedAvg", "beta=1.0")
    require(is_number(tau, at_least=0) and tau > 0, "tau", tau, "a number > 0", "tau=1.0")

    def distill(batch: Batch, w_global: Array) -> Array:
        xp, is_true = array_namespace(batch.outputs), batch.is_target
        logits = (xp.where(is_true, -1e9, z / tau) for z in (batch.run(w_global).outputs, batch.outputs))
        log_p, log_q = (log_softmax(z) for z in logits)
        return beta * xp.sum(xp.exp(log_p) * (log_p - log_q), axis=-1)

    local = LocalRule(penalty=distill if beta else None)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
