"""FedDyn: a regularizer of each client aligns the local optima with the global optimum."""

from fedlearn import Array, Context, LocalRule, State, Strategy, Transform, mean, uniform
from fedlearn.extend import asarray_like, is_number, require, zeros


def feddyn(*, alpha: float = 0.1, clients_per_round: int | None = None) -> Strategy:
    """Minimize ``F_k(w) - <g_k, w> + alpha / 2 ||w - w_global||^2`` at clients, with the client state ``g_k``.

    ``g_k <- g_k - alpha (w_k - w);  h <- h - (alpha / N) sum_P (w_k - w);  w <- (1 / |P|) sum_P w_k - h / alpha``

    Args:
        alpha: weight of the regularizer, > 0. Small values move the model far, but need many local steps.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: at a fixed point the gradients of all clients add up to zero, for any number of local steps.

    Reference: Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, *Federated Learning Based on Dynamic
    Regularization*, ICLR 2021, arXiv:2111.04263, Algorithm 1.
    """
    is_positive = is_number(alpha, at_least=0) and 0 < alpha < float("inf")
    require(is_positive, "alpha", alpha, "a finite number > 0", "alpha=0.1")

    def finish(delta_KD: Array, num_steps_K: Array, learning_rate: float, gradient: Array) -> tuple:
        return {"gradient": gradient - alpha * delta_KD}, {}

    def step(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        share = context.cohort_size / context.num_clients
        h_D = asarray_like(state["h"], update_D) - alpha * share * update_D
        return update_D - h_D / alpha, {"h": h_D}

    rule = LocalRule(
        correct=lambda grad, w, w_global, gradient: grad - gradient + alpha * (w - w_global),
        client_state=("gradient",),
        after_training=finish,
    )
    server = Transform(init=lambda layout: {"h": zeros(layout)}, update=step)
    return Strategy(select=uniform(clients_per_round), local=rule, aggregate=mean(weighting="equal"), server=server)
