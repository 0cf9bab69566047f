"""FLTrust: updates count as far as they point where the server's own does."""

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
    """The global model moves by the mean of the updates, each as long as the server's own and weighted by trust in it.

    ``w <- w + lr g``, ``g = sum_k TS_k (||g_0|| / ||g_k||) g_k / sum_k TS_k`` with ``TS_k = max(0, cos(g_k, g_0))``

    Args:
        root_client: where the server's root data lie; its update ``g_0`` is compared with and not averaged.
        num_root_examples: drawn uniformly from all clients' to be those data, as in the paper (simulations only, see
            `RootDataset`); None: what that client has. Rare classes in root data cause distrust of clients with them.
        learning_rate: >= 0.
        clients_per_round: cohort size, drawn uniformly, the root client not counted; None takes everyone.

    *Guarantees*: the step is never longer than ``learning_rate`` times the server's own update. If nobody points where
    the server does, the model stays.

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
