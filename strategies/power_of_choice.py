"""Power of choice: among random candidates, select the clients with the largest losses."""

import numpy as np

from fedlearn import Array, Strategy, mean
from fedlearn.algorithm import lookup_values, stateful_selector, training_loss
from fedlearn.extend import is_count, require


def power_of_choice(*, clients_per_round: int = 10, num_candidates: int = 20, weighting: str = "examples") -> Strategy:
    """Select the ``clients_per_round`` of ``num_candidates`` random clients with the largest last training losses.

    The loss of a candidate is the training loss of its last round (rpow-d in the paper). Candidates without a loss are
    selected first.

    Args:
        clients_per_round: m, cohort size, >= 1; at most the number of clients.
        num_candidates: d, number of clients drawn uniformly, >= m. ``d = m`` is uniform selection; a larger d converges
            faster, but favors clients with large losses.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: none for a privacy ledger, because the selection depends on client losses.

    Reference: Cho, Wang, Joshi, *Towards Understanding Biased Client Selection in Federated Learning*, AISTATS 2022,
    arXiv:2010.01243, sections 3 and 5.
    """
    require(
        is_count(clients_per_round),
        "clients_per_round",
        clients_per_round,
        "a whole number >= 1",
        "clients_per_round=10",
    )
    is_enough = is_count(num_candidates, at_least=clients_per_round)
    expected = f"a whole number >= clients_per_round={clients_per_round}"
    require(is_enough, "num_candidates", num_candidates, expected, f"num_candidates={2 * clients_per_round}")

    def choose(
        round: int, clients: Array, rng: np.random.Generator, clients_N: Array, value_N: Array, round_N: Array
    ) -> list[int]:
        candidates = [clients[i] for i in rng.choice(len(clients), min(num_candidates, len(clients)), replace=False)]
        loss = lookup_values(candidates, clients_N, value_N, default=np.inf)
        return [candidates[i] for i in np.argsort(-loss, kind="stable")[:clients_per_round]]

    return Strategy(select=stateful_selector(choose, training_loss), aggregate=mean(weighting=weighting))
