"""SignSGD with majority vote: one bit per parameter."""

from fedlearn import Array, Context, State, Strategy, Transform, mean, uniform
from fedlearn.compression import signs
from fedlearn.extend import array_namespace, is_number, require


def signsgd(*, learning_rate: float = 0.01, clients_per_round: int | None = None) -> Strategy:
    """Send the signs of updates; each coordinate of the model steps in the direction of the majority.

    ``w <- w + learning_rate sign(sum_k sign(w_k - w))``; a coordinate with a tie does not change.

    Args:
        learning_rate: server learning rate, >= 0.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: a client sends ``D / 8`` bytes. It has one vote per coordinate, for any size of its update.

    Reference: Bernstein, Zhao, Azizzadenesheli, Anandkumar, *signSGD with Majority Vote is Communication Efficient and
    Fault Tolerant*, ICLR 2019, arXiv:1810.05291, Algorithm 1.
    """
    require(is_number(learning_rate, at_least=0), "learning_rate", learning_rate, ">= 0", "learning_rate=0.01")

    def vote(mean_D: Array, state: State, context: Context) -> tuple[Array, State]:
        return learning_rate * array_namespace(mean_D).sign(mean_D), state

    return Strategy(
        select=uniform(clients_per_round),
        stages=(signs(),),
        aggregate=mean(weighting="equal"),
        server=Transform(update=vote),
    )
