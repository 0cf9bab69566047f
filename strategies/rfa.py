"""RFA: the geometric median of the updates."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.extend import is_count, is_number, require
from fedlearn.robust import distances_to, weighted_mean


def rfa(*, num_iterations: int = 8, smoothing: float = 1e-6, clients_per_round: int | None = None) -> Strategy:
    """Move the global model by ``argmin_v sum_k ||v - u_k||``, computed with the smoothed Weiszfeld algorithm.

    ``v <- sum_k b_k u_k / sum_k b_k`` with ``b_k = 1 / max(smoothing, ||v - u_k||)``. The iteration starts at ``v = 0``
    (the current global model), because no client can move this point.

    All clients have equal weights, because a malicious client can report any number of examples.

    Args:
        num_iterations: number of Weiszfeld steps per round, >= 1.
        smoothing: ``nu``, > 0. The weight of an update does not rise further below this distance.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: each iterate is a convex combination of the updates. If less than half of the clients of a round are
    malicious, the geometric median stays within a bounded distance of the honest updates.

    Reference: Pillutla, Kakade, Harchaoui, *Robust Aggregation for Federated Learning*, IEEE Transactions on Signal
    Processing 2022, arXiv:1912.13445, Algorithm 2.
    """
    require(is_count(num_iterations), "num_iterations", num_iterations, "a whole number >= 1", "num_iterations=8")
    require(is_number(smoothing, at_least=0) and smoothing > 0, "smoothing", smoothing, "> 0", "smoothing=1e-6")

    def geometric_median(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        v_D = 0 * updates.delta_KD[0]
        for _ in range(num_iterations):
            v_D = weighted_mean(updates.delta_KD, 1 / distances_to(updates.delta_KD, v_D).clip(smoothing))
        return v_D, state

    return Strategy(select=uniform(clients_per_round), aggregate=stacked(geometric_median))
