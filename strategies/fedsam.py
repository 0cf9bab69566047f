"""FedSAM: clients minimize the loss in a neighborhood, so that the global model lies in a flat minimum."""

from fedlearn import Array, LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import GradientAt
from fedlearn.extend import array_namespace, is_number, require


def fedsam(*, rho: float = 0.05, clients_per_round: int | None = None, weighting: str = "examples") -> Strategy:
    """Run FedAvg with steps along ``grad F_k(w + rho g / ||g||)``, ``g = grad F_k(w)``, both of the same batch.

    A step costs two gradients. The loss at ``w`` is reported.

    Args:
        rho: radius of the neighborhood, >= 0; 0 is FedAvg.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Qu, Li, Duan, Liu, Tang, Lu, *Generalized Federated Learning via Sharpness Aware Minimization*, ICML
    2022, arXiv:2206.02618, Algorithm 1 (FedSAM).
    """
    require(is_number(rho, at_least=0), "rho", rho, "a number >= 0; 0 is FedAvg", "rho=0.05")

    def sharpness_aware(gradient_at: GradientAt, w: Array, w_global: Array) -> Array:
        grad = gradient_at(w)
        return gradient_at(w + rho * grad / (array_namespace(grad).linalg.vector_norm(grad) + 1e-12))

    local = LocalRule(gradient=sharpness_aware if rho else None)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
