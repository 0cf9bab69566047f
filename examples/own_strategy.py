"""Write an aggregation rule with state: updates similar to the last step get larger weights."""

import numpy as np

import fedlearn
from fedlearn import Context, Layout, State, Strategy, Updates, stacked, uniform
from fedlearn.testing import check_strategy


def momentum_weighted(*, sharpness: float = 2.0, clients_per_round: int | None = None) -> Strategy:
    """Weight each update by its cosine with the step of the last round.

    Args:
        sharpness: weight of a client is ``exp(sharpness * cosine)``, >= 0; 0 is the mean.
        clients_per_round: cohort size; None for all clients.
    """

    def rule(updates: Updates, state: State, context: Context) -> tuple[np.ndarray, State]:
        delta_KD, last_D = np.asarray(updates.delta_KD), state["last"]
        norms_K = np.linalg.norm(delta_KD, axis=1) * np.linalg.norm(last_D)
        cosine_K = delta_KD @ last_D / np.maximum(norms_K, 1e-12)
        weights_K = np.exp(sharpness * cosine_K)
        step_D = (weights_K / weights_K.sum()) @ delta_KD
        return step_D.astype(np.float32), {"last": step_D.astype(np.float32)}

    def init(layout: Layout) -> State:
        return {"last": np.zeros(layout.num_parameters, np.float32)}

    return Strategy(select=uniform(clients_per_round), aggregate=stacked(rule, init=init))


check_strategy(momentum_weighted(clients_per_round=4))
print(f"fedlearn {fedlearn.__version__}: the strategy passes the conformance kit")
