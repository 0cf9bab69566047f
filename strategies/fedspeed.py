"""FedSpeed: two gradients per step against overfitting, and corrected proximal steps against client drift."""

from fedlearn import Array, LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import GradientAt
from fedlearn.extend import is_number, require


def fedspeed(
    *, rho: float = 0.1, alpha: float = 0.9, penalty: float = 0.1, clients_per_round: int | None = None
) -> Strategy:
    """Take local steps along ``(1 - alpha) g + alpha grad F_k(w + rho g) - h_k + penalty (w - w_global)``.

    ``g = grad F_k(w);  h_k <- h_k - penalty (w_k - w_global);`` client k sends ``w_k - h_k / penalty``

    ``h_k`` is the prox-correction of client k. Both gradients belong to one batch.

    Args:
        rho: step of the gradient ascent, >= 0.
        alpha: weight of the second gradient, in [0, 1].
        penalty: ``1 / lambda`` of the paper, > 0.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    Reference: Sun, Shen, Huang, Ding, Tao, *FedSpeed: Larger Local Interval, Less Communication Round, and Higher
    Generalization Accuracy*, ICLR 2023, arXiv:2302.10429, Algorithm 1.
    """
    require(is_number(rho, at_least=0), "rho", rho, "a number >= 0", "rho=0.1")
    require(is_number(alpha, at_least=0) and alpha <= 1, "alpha", alpha, "a number in [0, 1]", "alpha=0.9")
    require(is_number(penalty, at_least=0) and penalty > 0, "penalty", penalty, "a number > 0", "penalty=0.1")

    def quasi_gradient(gradient_at: GradientAt, w: Array, w_global: Array, prox: Array) -> Array:
        grad = gradient_at(w)
        return (1 - alpha) * grad + alpha * gradient_at(w + rho * grad)

    def finish(delta_KD: Array, num_steps_K: Array, learning_rate: float, prox: Array) -> tuple:
        return {"prox": prox - penalty * delta_KD}, {}

    local = LocalRule(
        gradient=quasi_gradient,
        correct=lambda grad, w, w_global, prox: grad - prox + penalty * (w - w_global),
        client_state=("prox",),
        after_training=finish,
        send=lambda delta_KD, prox: delta_KD - prox / penalty,
    )
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting="equal"))
