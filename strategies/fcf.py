"""FCF: federated collaborative filtering; the factors of a user stay at the client."""

from fedlearn import Array, LocalRule, Strategy, adaptive, mean, uniform
from fedlearn.algorithm import parameter_patterns


def fcf(
    *,
    personal_parameters: str | tuple[str, ...] = "user.*",
    learning_rate: float = 0.02,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 0.0001,
    clients_per_round: int | None = None,
) -> Strategy:
    """Keep the parameters of a user at the client; the server takes Adam steps for the items.

    ``m <- beta1 m + (1 - beta1) delta;  v <- beta2 v + (1 - beta2) delta^2;``
    ``w <- w + learning_rate m / (sqrt(v) + tau)``

    Most clients have no example of most items, so the mean update of an item is small. The size of Adam's step does not
    depend on it. Clients have equal weights, because example counts reveal the activity of users.

    Args:
        personal_parameters: name patterns of the parameters that describe a user.
        learning_rate: server learning rate, >= 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        tau: degree of adaptivity, > 0.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: no update contains parameters of a user. Each client is evaluated with its personal parameters.

    Reference: Ammad-ud-din et al., *Federated Collaborative Filtering for Privacy-Preserving Personalized
    Recommendation System*, 2019, arXiv:1901.09888.
    """

    def second_moment(v_D: Array, delta_D: Array) -> Array:
        return beta2 * v_D + (1 - beta2) * delta_D**2

    return Strategy(
        select=uniform(clients_per_round),
        local=LocalRule(personal_parameters=parameter_patterns(personal_parameters)),
        aggregate=mean(weighting="equal"),
        server=adaptive(second_moment, learning_rate=learning_rate, beta1=beta1, tau=tau),
    )
