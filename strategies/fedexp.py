"""FedExP: a server step as long as the clients' updates disagree."""

from fedlearn import Aggregator, Array, State, Strategy, Updates, mean, uniform
from fedlearn.extend import array_namespace, as_numpy, is_number, require


def fedexp(*, epsilon: float = 0.001, clients_per_round: int | None = None) -> Strategy:
    """Take extrapolated steps, as in projections onto convex sets: ``w <- w + eta (1 / M) sum_k delta_k``.

    ``eta = max(1, sum_k ||delta_k||^2 / (2 M (||mean_k delta_k||^2 + epsilon)))``

    Args:
        epsilon: > 0; keeps the step short where updates are as small as its square root.
        clients_per_round: cohort size, drawn uniformly; None takes everyone.

    *Guarantees*: the step is never shorter than FedAvg's with equal weights.

    Reference: Jhunjhunwala, Wang, Joshi, *FedExP: Speeding Up Federated Averaging via Extrapolation*, ICLR 2023,
    arXiv:2301.09604, equation 5.
    """
    positive = is_number(epsilon, at_least=0) and epsilon > 0
    require(positive, "epsilon", epsilon, "a number > 0", "epsilon=0.001")
    plainly = mean(weighting="equal")

    def add(memory: State, updates: Updates) -> State:
        xp = array_namespace(updates.delta_KD)
        square_K = as_numpy(xp.sum(updates.delta_KD**2, axis=-1)).astype(float)
        return {**plainly.add(memory, updates), "squares": memory["squares"] + float(square_K.sum())}

    def done(memory: State) -> Array:
        mean_D = plainly.finalize(memory)
        square = float(as_numpy(mean_D).astype(float) @ as_numpy(mean_D))
        return max(1.0, memory["squares"] / (2 * memory["weight"] * (square + epsilon))) * mean_D

    def merge(one: State, other: State) -> State:
        assert plainly.merge is not None
        return {**plainly.merge(one, other), "squares": one["squares"] + other["squares"]}

    def empty(layout: object) -> State:
        return {"total": None, "weight": 0.0, "squares": 0.0}

    aggregate = Aggregator(init=empty, add=add, finalize=done, merge=merge)
    return Strategy(select=uniform(clients_per_round), aggregate=aggregate)
