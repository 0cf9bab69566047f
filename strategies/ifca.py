"""IFCA: each client chooses the best of several models, so each model serves a cluster of clients."""

import numpy as np

from fedlearn import Array, Context, Layout, LocalRule, State, Strategy, Updates, mean, stacked, uniform
from fedlearn.algorithm import PersonalModel, aggregate_updates
from fedlearn.core import random_parameters
from fedlearn.extend import as_numpy, is_count, require


def ifca(
    *, num_clusters: int = 2, seed: int = 0, clients_per_round: int | None = None, weighting: str = "examples"
) -> Strategy:
    """Train several models; each client updates the model with the smallest loss on its examples.

    ``j_k = argmin_j F_k(w_j);  w_j <- w_j + sum_{k: j_k = j} (n_k / n_j) (w_k - w_j)``

    ``w_0`` is the global model. Clients receive all models and compare them, at the cost of a pass each. The personal
    model of a client is the model that it trained in its last round.

    Args:
        num_clusters: number of models, >= 2.
        seed: seed of the initial models except ``w_0``. If the clusters do not separate, try another seed (as in the
            paper).
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Ghosh, Chung, Yin, Ramchandran, *An Efficient Framework for Clustered Federated Learning*, NeurIPS 2020,
    arXiv:2006.04088, Algorithm 1 (model averaging).
    """
    require(is_count(num_clusters, at_least=2), "num_clusters", num_clusters, "a whole number >= 2", "num_clusters=2")
    others = tuple(f"model_{j}" for j in range(1, num_clusters))
    models = ("w_global", *others)

    def initial_models(layout: Layout) -> State:
        return {name: random_parameters(layout, seed, j) for j, name in enumerate(others, start=1)}

    def move(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        chosen_K = np.argmin([updates.metrics[f"loss/{name}"].client_means() for name in models], axis=0)
        moves = [0 * updates.delta_KD[0]] * num_clusters
        for j in np.unique(chosen_K).tolist():
            moves[j], _ = aggregate_updates(cluster_mean, updates.rows(chosen_K == j))
        return moves[0], {name: as_numpy(state[name]) + as_numpy(moves[j]) for j, name in enumerate(others, start=1)}

    cluster_mean = mean(weighting=weighting)
    local = LocalRule(receives=others, evaluate_models=models, personal=PersonalModel())
    aggregate = stacked(move, init=initial_models, broadcast=dict, reads=("metrics",))
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=aggregate)
