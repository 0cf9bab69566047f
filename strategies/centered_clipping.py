"""Centered clipping: updates are clipped around the previous aggregate."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.extend import asarray_like, is_count, is_number, require, zeros
from fedlearn.robust import distances_to, weighted_mean


def centered_clipping(
    *, radius: float = 1.0, num_iterations: int = 1, clients_per_round: int | None = None
) -> Strategy:
    """Move the global model by ``v``, which starts each round at its previous value.

    ``v <- v + (1 / n) sum_k (u_k - v) min(1, radius / ||u_k - v||)``

    Args:
        radius: ``tau``, largest distance from ``v`` of a clipped update, > 0.
        num_iterations: ``L``, number of these steps per round, >= 1.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: in one step a client moves ``v`` by at most ``radius / n``, for any update.

    Reference: Karimireddy, He, Jaggi, *Learning from History for Byzantine Robust Optimization*, ICML 2021,
    arXiv:2012.10333, Algorithm 2.
    """
    require(is_number(radius, at_least=0) and radius > 0, "radius", radius, "a number > 0", "radius=1.0")
    require(is_count(num_iterations), "num_iterations", num_iterations, "a whole number >= 1", "num_iterations=1")

    def clipped_mean(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        updates_KD = updates.delta_KD
        v_D = asarray_like(state["v"], updates_KD)
        for _ in range(num_iterations):
            scale_K = radius / distances_to(updates_KD, v_D).clip(radius)
            v_D = v_D + scale_K.mean() * (weighted_mean(updates_KD, scale_K) - v_D)
        return v_D, {"v": v_D}

    aggregate = stacked(clipped_mean, init=lambda layout: {"v": zeros(layout)})
    return Strategy(select=uniform(clients_per_round), aggregate=aggregate)
