"""FedRep: a shared representation and a personal head at each client, trained one after the other."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import parameter_patterns
from fedlearn.extend import is_count, require


def fedrep(
    *,
    personal_parameters: str | tuple[str, ...] = "out.*",
    head_epochs: int = 5,
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Train the personal head of each client on the received representation, then the representation.

    ``h_k <- SGD(f_k(h_k, phi)), head_epochs passes;  phi_k <- SGD(f_k(h_k, phi)), local.epochs passes;``
    ``phi <- sum_k (n_k / n) phi_k``

    Args:
        personal_parameters: name patterns of the parameters of the head, which stay at the clients.
        head_epochs: passes over the examples for the head, >= 1.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: no update contains personal parameters, and each client is evaluated with its own.

    Reference: Collins, Hassani, Mokhtari, Shakkottai, *Exploiting Shared Representations for Personalized Federated
    Learning*, ICML 2021, arXiv:2102.07078, Algorithm 1.
    """
    require(is_count(head_epochs), "head_epochs", head_epochs, "a whole number >= 1", "head_epochs=5")
    return Strategy(
        select=uniform(clients_per_round),
        local=LocalRule(personal_parameters=parameter_patterns(personal_parameters), personal_epochs=head_epochs),
        aggregate=mean(weighting=weighting),
    )
