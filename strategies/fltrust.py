"""FLTrust: the weight of an update is its similarity to an update on the root dataset of the server."""

from fedlearn import Array, Context, State, Strategy, Updates, sgd, stacked, uniform
from fedlearn.algorithm import RootDataset
from fedlearn.robust import distances_to, inner_products, weighted_mean


def fltrust(
    *,
    root_client: int = 0,
    num_root_examples: int | None = None,
    learning_rate: float = 1.0,
    clients_per_round: int | None = None,
) -> Strategy:
    """Move the global model by the mean of updates that are scaled to the root update's norm and weighted by trust.

    ``w <- w + lr g``, ``g = sum_k TS_k (||g_0|| / ||g_k||) g_k / sum_k TS_k`` with ``TS_k = max(0, cos(g_k, g_0))``

    Args:
        root_client: id of the client with the root dataset. Its update ``g_0`` is the reference and not averaged.
        num_root_examples: number of examples of all clients that form the root dataset, as in the paper (simulations
            only, see `RootDataset`). None takes the root client's examples. Clients with rare classes get less trust.
        learning_rate: server learning rate, >= 0.
        clients_per_round: cohort size without the root client, drawn uniformly; None selects all clients.

    *Guarantees*: the step is never longer than ``learning_rate`` times the root update. If no update has a positive
    similarity to it, the model does not change.

    Reference: Cao, Fang, Liu, Gong, *FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping*, NDSS 2021,
    arXiv:2012.13995, Algorithm 2.
    """
    root = RootDataset(client=root_client, num_examples=num_root_examples)

    def trusted_mean(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        is_root_K, g_KD = root.is_root(updates.clients_K), updates.delta_KD
        g0_D = g_KD[is_root_K][0]
        norm_K = distances_to(g_KD, 0 * g0_D).clip(1e-30)
        norm0 = norm_K[is_root_K][0]
        trust_K = (inner_products(g_KD, g0_D) / (norm_K * norm0)).clip(0) * ~is_root_K
        weights_K = trust_K * norm0 / norm_K
        if not trust_K.any():
            return 0 * g0_D, state
        return weights_K.sum() / trust_K.sum() * weighted_mean(g_KD, weights_K), state

    return Strategy(
        select=root.add_to_cohorts(uniform(clients_per_round)),
        aggregate=stacked(trusted_mean, reads=("clients_K",)),
        server=sgd(learning_rate),
        root=root,
    )
