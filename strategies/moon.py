"""MOON: a contrastive loss pulls the features of a client towards the features of the global model."""

from fedlearn import Array, LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import Batch
from fedlearn.extend import array_namespace, is_number, require


def moon(
    *, mu: float = 1.0, tau: float = 0.5, clients_per_round: int | None = None, weighting: str = "examples"
) -> Strategy:
    """Run FedAvg with clients that minimize ``l_sup + mu l_con``, a supervised and a contrastive loss.

    ``l_con = -log(exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau)))``

    ``z``, ``z_glob`` and ``z_prev`` are the features of an example under the trained model, the global model, and the
    client's model after its last round. Features are the inputs of the last layer (in the paper: of a projection head).
    ``sim`` is the cosine. The first round of a client is the same as in FedAvg.

    Args:
        mu: weight of the contrastive loss, >= 0; 0 is FedAvg. The paper takes the best of 0.1, 1, 5 and 10.
        tau: temperature, > 0.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Li, He, Song, *Model-Contrastive Federated Learning*, CVPR 2021, arXiv:2103.16257, equations 3 and 4.
    """
    require(is_number(mu, at_least=0), "mu", mu, "a number >= 0; 0 is FedAvg", "mu=1.0")
    require(is_number(tau, at_least=0) and tau > 0, "tau", tau, "a number > 0", "tau=0.5")

    def sim(a_BF: Array, b_BF: Array) -> Array:
        xp = array_namespace(a_BF)
        squares_B = xp.sum(a_BF**2, axis=-1) * xp.sum(b_BF**2, axis=-1)
        return xp.sum(a_BF * b_BF, axis=-1) / xp.sqrt(squares_B + 1e-16)  # features may be zero

    def contrast(batch: Batch, w_global: Array, w_previous: Array) -> Array:
        z, z_glob, z_prev = (model.features for model in (batch, batch.run(w_global), batch.run(w_previous)))
        near, far = sim(z, z_glob) / tau, sim(z, z_prev) / tau
        return mu * (array_namespace(z).logaddexp(near, far) - near)

    local = LocalRule(penalty=contrast if mu else None, previous_model=mu > 0)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
