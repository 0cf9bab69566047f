"""Oort: clients are selected by the expected utility of their examples, with some exploration."""

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
    """Select clients of high utility ``n_k loss_k + sqrt(0.1 log R / L_k)``, ``L_k`` the last round of client k.

    A share ``exploration decay^R``, at least ``min_exploration``, are clients that never took part; the others are
    drawn, in proportion to utility, from those within 95 % of what takes to be among the best. Unlike in the paper the
    loss is the mean and not its quadratic one, and all clients are taken to be equally fast.

    Args:
        clients_per_round: >= 1; all where there are fewer.
        exploration: share of new clients in the first round, in [0, 1].
        decay: of that share, round by round, in [0, 1].
        min_exploration: that share in the end, in [0, 1].
        weighting: ``examples`` or ``equal``.

    *Guarantees*: none for a privacy ledger: the choice follows from clients' losses.

    Reference: Lai, Zhu, Madhyastha, Chowdhury, *Oort: Efficient Federated Learning via Guided Participant Selection*,
    OSDI 2021, arXiv:2010.06081, Algorithm 1.
    """
    require(is_count(clients_per_round), "clients_per_round", clients_per_round, "a whole number >= 1", "10")
    for name, share in (("exploration", exploration), ("decay", decay), ("min_exploration", min_exploration)):
        require(is_number(share, at_least=0) and share <= 1, name, share, "a share in [0, 1]", f"{name}=0.9")

    def choose(
        round: int, clients: Array, rng: np.random.Generator, clients_N: Array, value_N: Array, round_N: Array
    ) -> list[int]:
        size = min(clients_per_round, len(clients))
        known = np.intersect1d(clients_N, np.asarray(clients))
        new = np.setdiff1d(np.asarray(clients), known)
        wanted = int(np.ceil(max(min_exploration, exploration * decay ** (round - 1)) * size))
        num_new = min(len(new), max(wanted, size - len(known)))
        chosen = rng.choice(new, num_new, replace=False).tolist()
        if size > num_new:
            last = lookup_values(known, clients_N, round_N, default=1)
            taught = lookup_values(known, clients_N, value_N, default=0)
            utility = np.minimum(taught, np.quantile(taught, OUTLIER)) + np.sqrt(CONFIDENCE * np.log(round) / last)
            pool = utility >= CUTOFF * np.sort(utility)[num_new - size]
            odds = utility[pool] + 1e-12
            chosen += rng.choice(known[pool], size - num_new, replace=False, p=odds / odds.sum()).tolist()
        return chosen

    select = stateful_selector(choose, lambda context: context.num_examples_K * training_loss(context))
    return Strategy(select=select, aggregate=mean(weighting=weighting))
