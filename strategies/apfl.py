"""APFL: each client predicts with a mixture of its personal model and the global model."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import PersonalModel
from fedlearn.extend import is_number, require


def apfl(*, alpha: float = 0.5, clients_per_round: int | None = None, weighting: str = "examples") -> Strategy:
    """Run FedAvg for the global model; each client also trains ``v_k`` and predicts with ``alpha v_k + (1 - alpha) w``.

    ``v_k <- v_k - eta grad_v F_k(alpha v_k + (1 - alpha) w)``, as many steps as for the global model, with ``w`` as it
    came (the paper lets both move step by step)

    Args:
        alpha: share of the client's own model, in (0, 1]; 1 is training alone.
        clients_per_round: cohort size, drawn uniformly; None takes everyone.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: the global model and all updates equal those of FedAvg bit for bit.

    Reference: Deng, Kamani, Mahdavi, *Adaptive Personalized Federated Learning*, 2020, arXiv:2003.13461, Algorithm 1.
    """
    share = is_number(alpha, at_least=0) and 0 < alpha <= 1
    require(share, "alpha", alpha, "a share in (0, 1]", "alpha=0.5")
    personal = PersonalModel(
        correct=lambda grad, w, w_global: alpha**2 * grad,  # gradient by v of the mixture alpha v + ...
        start=lambda own, w_global: alpha * own + (1 - alpha) * w_global,
        after_training=lambda own, delta: own + delta / alpha,
    )
    local = LocalRule(personal=personal)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
