"""APFL: each client predicts with a mixture of its personal model and the global model."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import PersonalModel
from fedlearn.extend import is_number, require


def apfl(*, alpha: float = 0.5, clients_per_round: int | None = None, weighting: str = "examples") -> Strategy:
    """Run FedAvg for the global model; each client also trains ``v_k`` and predicts with ``alpha v_k + (1 - alpha) w``.

    ``v_k <- v_k - eta grad_v F_k(alpha v_k + (1 - alpha) w)``, with as many steps as for the global model. ``w`` is the
    received model; in the paper both models move step by step.

    Args:
        alpha: share of the personal model, in (0, 1]; 1 is training alone.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: the global model and all updates are the same as in FedAvg, bit for bit.

    Reference: Deng, Kamani, Mahdavi, *Adaptive Personalized Federated Learning*, 2020, arXiv:2003.13461, Algorithm 1.
    """
    is_share = is_number(alpha, at_least=0) and 0 < alpha <= 1
    require(is_share, "alpha", alpha, "a share in (0, 1]", "alpha=0.5")
    personal = PersonalModel(
        correct=lambda grad, w, w_global: alpha**2 * grad,  # gradient with respect to v of the loss of the mixture
        start=lambda personal, w_global: alpha * personal + (1 - alpha) * w_global,
        after_training=lambda personal, delta: personal + delta / alpha,
    )
    local = LocalRule(personal=personal)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
