"""Oort: select clients by the expected utility of their examples, and explore new clients."""

import numpy as np

from fedlearn import Array, Strategy, mean
from fedlearn.algorithm import lookup_values, stateful_selector, training_loss
from fedlearn.extend import is_count, is_number, require

CUTOFF, CONFIDENCE, OUTLIER = 0.95, 0.1, 0.95  # as in the paper's implementation


def oort(
    *,
    clients_per_round: int = 10,
    exploration: float = 0.9,
    decay: float = 0.98,
    min_exploration: float = 0.2,
    weighting: str = "examples",
) -> Strategy:
    """Select clients with a high utility ``n_k loss_k + sqrt(0.1 log R / L_k)`` in round ``R``.

    ``L_k`` is the last round of client k. A share of ``exploration decay^(R - 1)`` of the cohort, at least
    ``min_exploration``, are new clients. The other clients are drawn in proportion to utility, among clients with at
    least 95 % of the utility that would place them in the cohort. Unlike in the paper, the loss is the mean (not the
    quadratic mean), and all clients count as equally fast.

    Args:
        clients_per_round: cohort size, >= 1; at most the number of clients.
        exploration: share of new clients in the first round, in [0, 1].
        decay: factor of this share per round, in [0, 1].
        min_exploration: smallest value of this share, in [0, 1].
        weighting: ``examples`` or ``equal``.

    *Guarantees*: none for a privacy ledger, because the selection depends on client losses.

    Reference: Lai, Zhu, Madhyastha, Chowdhury, *Oort: Efficient Federated Learning via Guided Participant Selection*,
    OSDI 2021, arXiv:2010.06081, Algorithm 1.
    """
    require(
        is_count(clients_per_round),
        "clients_per_round",
        clients_per_round,
        "a whole number >= 1",
        "clients_per_round=10",
    )
    for name, share in (("exploration", exploration), ("decay", decay), ("min_exploration", min_exploration)):
        require(is_number(share, at_least=0) and share <= 1, name, share, "a share in [0, 1]", f"{name}=0.9")

    def choose(
        round: int, clients: Array, rng: np.random.Generator, clients_N: Array, value_N: Array, round_N: Array
    ) -> list[int]:
        size = min(clients_per_round, len(clients))
        known = np.intersect1d(clients_N, np.asarray(clients))
        new = np.setdiff1d(np.asarray(clients), known)
        num_wanted = int(np.ceil(max(min_exploration, exploration * decay ** (round - 1)) * size))
        num_new = min(len(new), max(num_wanted, size - len(known)))
        chosen = rng.choice(new, num_new, replace=False).tolist()
        if size > num_new:
            last_round = lookup_values(known, clients_N, round_N, default=1)
            value = lookup_values(known, clients_N, value_N, default=0)
            utility = np.minimum(value, np.quantile(value, OUTLIER)) + np.sqrt(CONFIDENCE * np.log(round) / last_round)
            pool = utility >= CUTOFF * np.sort(utility)[num_new - size]
            weights = utility[pool] + 1e-12
            chosen += rng.choice(known[pool], size - num_new, replace=False, p=weights / weights.sum()).tolist()
        return chosen

    select = stateful_selector(choose, lambda context: context.num_examples_K * training_loss(context))
    return Strategy(select=select, aggregate=mean(weighting=weighting))
