"""Krum and multi-Krum: the updates with the closest neighbors."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.extend import is_count, require
from fedlearn.robust import rank_by_krum, resolve_num_malicious, squared_distances, unweighted_mean

UNKNOWN_NUM_UPDATES = 2**31  # used if the cohort size is unknown; each round checks again


def krum(*, num_malicious: int | None = None, num_to_keep: int = 1, clients_per_round: int | None = None) -> Strategy:
    """Move the global model by the mean of the ``num_to_keep`` updates with the lowest scores.

    ``s(i) = sum_{i -> j} ||u_i - u_j||^2`` over the ``n - f - 2`` other updates closest to ``u_i``;
    ``w <- w + (1 / m) sum of the m updates with the lowest scores``

    Args:
        num_malicious: ``f``, number of malicious clients per round to tolerate, with ``n >= 2 f + 3`` updates in a
            round; None takes the largest possible number.
        num_to_keep: ``m``, in [1, n - f - 2]; 1 is Krum, larger numbers are multi-Krum.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees* with at most ``f`` malicious clients: let ``d`` be the largest squared distance of two honest updates.
    An update with a squared distance above ``d (n - f - 2) / (n - 2 f - 1)`` to each honest update is never selected.

    Reference: Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent*, NeurIPS 2017, arXiv:1703.02757, section 4.
    """
    require(is_count(num_to_keep), "num_to_keep", num_to_keep, "a whole number >= 1", "num_to_keep=1")

    def num_malicious_in(num_updates: int) -> int:
        f = resolve_num_malicious(num_malicious, num_updates, per_malicious=2)
        largest = max(1, num_updates - f - 2)
        expected = f"at most n - num_malicious - 2 = {largest} of {num_updates} updates"
        require(
            num_to_keep <= largest, "strategy.num_to_keep", num_to_keep, expected, f"strategy.num_to_keep={largest}"
        )
        return f

    def rule(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        ranked_K = rank_by_krum(squared_distances(updates.delta_KD), num_malicious_in(len(updates)))
        return unweighted_mean(updates.delta_KD[ranked_K[:num_to_keep]]), state

    num_malicious_in(clients_per_round or UNKNOWN_NUM_UPDATES)
    return Strategy(select=uniform(clients_per_round), aggregate=stacked(rule))
