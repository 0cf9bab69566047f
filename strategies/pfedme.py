"""pFedMe: personal models from the Moreau envelope of each client's loss."""

from fedlearn import Strategy, mean, proximal, sgd, uniform
from fedlearn.algorithm import PersonalModel
from fedlearn.extend import is_number, require


def pfedme(
    *, penalty: float = 1.0, learning_rate: float = 1.0, beta: float = 1.0, clients_per_round: int | None = None
) -> Strategy:
    """Minimize ``F_k(theta) + penalty / 2 ||theta - w||^2`` at each client; ``theta_k`` is the personal model.

    ``w_k = w - learning_rate penalty (w - theta_k);  w <- (1 - beta) w + beta (1 / |P|) sum_P w_k``

    A client solves for theta once per round, with all its local steps (``R = 1`` in the paper).

    Args:
        penalty: lambda, >= 0. Training diverges if local.learning_rate is above ``2 / penalty``.
        learning_rate: eta, learning rate of ``w``, >= 0.
        beta: weight of the mean of ``w_k``, >= 0; 1 takes the mean itself.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    Reference: Dinh, Tran, Nguyen, *Personalized Federated Learning with Moreau Envelopes*, NeurIPS 2020,
    arXiv:2006.08848, Algorithm 1.
    """
    for name, number in (("penalty", penalty), ("learning_rate", learning_rate), ("beta", beta)):
        require(is_number(number, at_least=0), name, number, "a number >= 0", f"{name}=1.0")
    return Strategy(
        select=uniform(clients_per_round),
        local=proximal(penalty)._replace(personal=PersonalModel()),
        aggregate=mean(weighting="equal"),
        server=sgd(beta * learning_rate * penalty),
    )
