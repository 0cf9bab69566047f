"""FedExP: the server step is longer the more the updates disagree."""

from fedlearn import Aggregator, Array, State, Strategy, Updates, mean, uniform
from fedlearn.extend import array_namespace, as_numpy, is_number, require


def fedexp(*, epsilon: float = 0.001, clients_per_round: int | None = None) -> Strategy:
    """Take extrapolated steps, as in projections onto convex sets: ``w <- w + eta (1 / M) sum_k delta_k``.

    ``eta = max(1, sum_k ||delta_k||^2 / (2 M (||mean_k delta_k||^2 + epsilon)))``

    Args:
        epsilon: > 0. It limits the step if the norm of updates is below the square root of epsilon.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: the step is never shorter than the step of FedAvg with equal weights.

    Reference: Jhunjhunwala, Wang, Joshi, *FedExP: Speeding Up Federated Averaging via Extrapolation*, ICLR 2023,
    arXiv:2301.09604, equation 5.
    """
    is_positive = is_number(epsilon, at_least=0) and epsilon > 0
    require(is_positive, "epsilon", epsilon, "a number > 0", "epsilon=0.001")
    equal_mean = mean(weighting="equal")

    def add(partial: State, updates: Updates) -> State:
        xp = array_namespace(updates.delta_KD)
        square_K = as_numpy(xp.sum(updates.delta_KD**2, axis=-1)).astype(float)
        return {**equal_mean.add(partial, updates), "squares": partial["squares"] + float(square_K.sum())}

    def finalize(partial: State) -> Array:
        mean_D = equal_mean.finalize(partial)
        square = float(as_numpy(mean_D).astype(float) @ as_numpy(mean_D))
        return max(1.0, partial["squares"] / (2 * partial["weight"] * (square + epsilon))) * mean_D

    def merge(first: State, second: State) -> State:
        assert equal_mean.merge is not None
        return {**equal_mean.merge(first, second), "squares": first["squares"] + second["squares"]}

    def empty(layout: object) -> State:
        return {"total": None, "weight": 0.0, "squares": 0.0}

    aggregate = Aggregator(init=empty, add=add, finalize=finalize, merge=merge)
    return Strategy(select=uniform(clients_per_round), aggregate=aggregate)
