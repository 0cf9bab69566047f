"""FLoRA: clients train adapters of different ranks, and the server stacks them and merges the stack into the model."""

import numpy as np

from fedlearn import Array, Context, Layout, LocalRule, State, Strategy, Updates, mean, stacked
from fedlearn.algorithm import aggregate_updates, get_selector
from fedlearn.core import find_adapters, random_parameters
from fedlearn.extend import as_numpy, is_count, require


def flora(
    *,
    ranks: tuple[int, ...] | None = None,
    clients_per_round: int | None = None,
    weighting: str = "examples",
    select: str = "uniform",
) -> Strategy:
    """Stack the adapters of all clients, merge the product, and start with fresh adapters in the next round.

    ``A = [A_1; ...; A_K];  B = [p_1 B_1, ..., p_K B_K];  M <- M + B A = M + sum_k p_k B_k A_k``

    An adapted map is ``(W + s (M + B A)) x``. Clients receive M in place of the stacks, so they need no earlier rounds.
    They train A and B, and send only these and the head, of which the server takes the mean. Each round starts with a
    new random A and with B at zero.

    Args:
        ranks: rank of the adapters of client c, at position c modulo the length, each at most ``model.rank``; None
            gives all clients ``model.rank``. A client of a lower rank keeps the other rows of A and columns of B at
            zero, and sends them as zeros.
        clients_per_round: cohort size; None selects all clients.
        weighting: p_k is in proportion to the training ``examples``, or ``equal``.
        select: ``uniform``, ``poisson``, ``weighted`` or ``round_robin``, as in `fedavg`.

    *Guarantees*: the merged product is the weighted mean of the products of the clients, for any ranks. The model needs
    the matrices M (``model.mergeable=true``). Noise at the server and masks need a sum of updates, so they are refused;
    DP-SGD is refused for different ranks.

    Reference: Wang, Shen, He, Sun, Wang, Lyu, Li, *FLoRA: Federated Fine-Tuning Large Language Models with
    Heterogeneous Low-Rank Adaptations*, NeurIPS 2024, arXiv:2409.05976, Algorithm 1.
    """
    ranks = None if ranks is None else whole_numbers(ranks)
    weighted_mean = mean(weighting=weighting)

    def start(layout: Layout, params: Array, client: int) -> Array:
        return params if ranks is None else with_rank(layout, params, ranks[client % len(ranks)])

    def merge(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        assert context.layout is not None
        layout, model = context.layout, context.model_layout or context.layout
        before = model.unpack(as_numpy(context.params_D))
        received_S = layout.pack({leaf.name: before[leaf.name] for leaf in layout.leaves})
        clients_K, delta_KS = updates.clients_K.tolist(), as_numpy(updates.delta_KD)
        after_K = [layout.unpack(start(layout, received_S, k) + d) for k, d in zip(clients_K, delta_KS, strict=True)]
        weights_K = np.ones(len(clients_K)) if weighting == "equal" else updates.num_examples_K
        fresh = layout.unpack(random_parameters(layout, context.seed, context.round))
        mean_S, _ = aggregate_updates(weighted_mean, updates)
        step = {name: np.zeros_like(leaf) for name, leaf in before.items()} | layout.unpack(as_numpy(mean_S))
        for first, second, merged in find_adapters(model):
            step[first], step[second] = fresh[first] - before[first], -before[second]
            step[merged] = stacked_product([a[first] for a in after_K], [a[second] for a in after_K], weights_K)
        return model.pack(step), state

    return Strategy(
        select=get_selector(select, clients_per_round),
        local=LocalRule(frozen_parameters=("*.lora_merged.weight",), start=None if ranks is None else start),
        aggregate=stacked(merge, init=lambda layout: check_ranks(layout, ranks), reads=("clients_K",)),
        merges_adapters=True,
    )


def whole_numbers(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ranks as a tuple, after a check. Settings of a run have lists."""
    is_list = not isinstance(ranks, str | int | float) and len(ranks) > 0 and all(map(is_count, ranks))
    require(is_list, "ranks", ranks, "a list of whole numbers >= 1, or null", "'strategy.ranks=[4,8]'")
    return tuple(ranks)


def check_ranks(layout: Layout, ranks: tuple[int, ...] | None) -> State:
    """Refuse ranks above the rank of the model. Return the empty state."""
    most, shapes = max(ranks or (1,)), {leaf.name: leaf.shape for leaf in layout.leaves}
    rank = min((shapes[adapter.first][0] for adapter in find_adapters(layout)), default=most)
    expected = f"ranks of at most {rank}, the rank of the model"
    require(most <= rank, "strategy.ranks", list(ranks or ()), expected, f"model.rank={most}")
    return {}


def with_rank(layout: Layout, params: Array, rank: int) -> Array:
    """Return parameters whose adapters have zeros in the rows of A and the columns of B after this rank."""
    params = np.array(params)
    leaves = layout.unpack(params)
    for first, second, _ in find_adapters(layout):
        leaves[first][rank:] = 0
        leaves[second][:, rank:] = 0
    return params


def stacked_product(first_K: list[np.ndarray], second_K: list[np.ndarray], weights_K: np.ndarray) -> np.ndarray:
    """Return the product of stacked adapters, ``sum_k p_k B_k A_k``.

    >>> stacked_product([np.ones((1, 2)), np.ones((3, 2))], [np.ones((2, 1)), np.ones((2, 3))], np.array([1, 1]))
    array([[2., 2.],
           [2., 2.]])

    Args:
        first_K: matrix A of each client, rank x inputs; the ranks may differ.
        second_K: matrix B of each client, outputs x rank.
        weights_K: weight of each client; the p_k are these, divided by their sum.
    """
    shares_K = np.asarray(weights_K, np.float64) / np.sum(weights_K)
    stack_A = np.concatenate([np.asarray(first, np.float64) for first in first_K])
    stack_B = np.concatenate([share * second for share, second in zip(shares_K, second_K, strict=True)], axis=1)
    product: np.ndarray = stack_B @ stack_A
    return product
