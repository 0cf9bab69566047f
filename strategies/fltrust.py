"""FLTrust: updates count as far as they point where the server's own does."""

from fedlearn import (
    Array,
    Context,
    FedlearnError,
    Memory,
    Selector,
    Stage,
    Strategy,
    Transform,
    distances_to,
    inner_products,
    is_count,
    kept,
    require,
    uniform,
    updates_of,
    weighted_mean,
)  # fmt: skip


def fltrust(*, root_client: int = 0, clients_per_round: int | None = None) -> Strategy:
    """The global model moves by the mean of the updates, each as long as the server's own and weighted by trust in it.

    ``g = sum_k TS_k (||g_0|| / ||g_k||) g_k / sum_k TS_k`` with ``TS_k = max(0, cos(g_k, g_0))``

    The server's root data set lies at a client that the server's operator runs: it takes part in each round, and trains
    as all others do. Its update ``g_0`` is compared with and not averaged.

    Args:
        root_client: who that is.
        clients_per_round: cohort size, drawn uniformly, the root client not counted; None takes everyone.

    *Guarantees*: the step is never longer than the server's own update. If nobody points where the server does,
    the model stays.

    Reference: Cao, Fang, Liu, Gong, *FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping*, NDSS 2021,
    arXiv:2012.13995, Algorithm 2.
    """
    require(is_count(root_client, at_least=0), "root_client", root_client, "a client's number", "root_client=0")
    among = uniform(clients_per_round)

    def update(nothing_D: Array, memory: Memory, context: Context) -> tuple[Array, Memory]:
        updates = updates_of(context)
        is_root_K = updates.clients_K == root_client
        if not is_root_K.any():
            raise FedlearnError(f"client {root_client}, where the server's root data lie, sent no update")
        updates_KD, g0_D = updates.delta_KD, updates.delta_KD[is_root_K][0]
        norm_K = distances_to(updates_KD, 0 * g0_D).clip(1e-30)
        norm0 = norm_K[is_root_K][0]
        trust_K = (inner_products(updates_KD, g0_D) / (norm_K * norm0)).clip(0) * ~is_root_K
        if not trust_K.any():
            return 0 * g0_D, memory
        weights_K = trust_K * norm0 / norm_K
        return weights_K.sum() / trust_K.sum() * weighted_mean(updates_KD, weights_K), memory

    rule = Stage(server=Transform(update=update))
    select = Selector(choose=lambda round, clients, rng: list({root_client, *among.choose(round, clients, rng)}))
    return Strategy(select=select, aggregate=kept(), stages=(rule,))
