"""FedCM: each local step adds the direction of the last global step, a momentum at the clients."""

from fedlearn import Array, Context, LocalRule, State, Strategy, Transform, mean, uniform
from fedlearn.extend import asarray_like, is_number, require, zeros


def fedcm(*, alpha: float = 0.1, clients_per_round: int | None = None) -> Strategy:
    """Take local steps along ``alpha grad F_k(w) + (1 - alpha) Delta``, and ``w <- w - eta S Delta``.

    ``Delta <- -(1 / (eta S |P|)) sum_P (w_k - w)``, with the learning rate ``eta`` and ``S`` local steps

    ``Delta`` is the mean direction of a step for plain SGD, so other optimizers and momentum are refused. Set
    ``local.steps`` if clients have different numbers of examples: ``S`` is the mean of their steps otherwise.

    Args:
        alpha: weight of the gradient, in (0, 1]; 1 is FedAvg with equal weights.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    Reference: Xu, Wang, Wang, Yao, *FedCM: Federated Learning with Client-level Momentum*, 2021, arXiv:2106.10874,
    Algorithm 2.
    """
    require(is_number(alpha, at_least=0) and 0 < alpha <= 1, "alpha", alpha, "a number in (0, 1]", "alpha=0.1")

    def keep(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        length = max(context.learning_rate * context.num_steps, 1e-12)
        return update_D, {"momentum": asarray_like(-update_D / length, update_D)}

    rule = LocalRule(
        correct=lambda grad, w, w_global, momentum: alpha * grad + (1 - alpha) * momentum,
        receives=("momentum",),
        requires_sgd=True,
    )
    server = Transform(
        init=lambda layout: {"momentum": zeros(layout)},
        update=keep,
        broadcast=lambda state: {"momentum": state["momentum"]},
        reads_num_steps=True,
    )
    return Strategy(select=uniform(clients_per_round), local=rule, aggregate=mean(weighting="equal"), server=server)
