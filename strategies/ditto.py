"""Ditto: a personal model at each client, pulled towards the global model."""

from fedlearn import LocalRule, Strategy, mean, proximal, uniform
from fedlearn.algorithm import PersonalModel
from fedlearn.extend import is_number, require


def ditto(*, penalty: float = 0.1, clients_per_round: int | None = None, weighting: str = "examples") -> Strategy:
    """Run FedAvg for the global model; each client also trains a personal model ``v_k`` and keeps it.

    ``v_k <- v_k - eta (grad F_k(v_k) + penalty (v_k - w))``, with as many steps as for the global model

    Args:
        penalty: lambda, >= 0; 0 is training alone; with large values ``v_k`` follows the global model.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: the global model and all updates are the same as in FedAvg, bit for bit.

    Reference: Li, Hu, Beirami, Smith, *Ditto: Fair and Robust Federated Learning Through Personalization*, ICML 2021,
    arXiv:2012.04221, Algorithm 1.
    """
    require(is_number(penalty, at_least=0), "penalty", penalty, "a number >= 0", "penalty=0.1")
    local = LocalRule(personal=PersonalModel(correct=proximal(penalty).correct))
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
