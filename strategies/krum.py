"""Krum and multi-Krum: the updates that have the most others close by."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.extend import is_count, require
from fedlearn.robust import rank_by_krum, resolve_num_malicious, squared_distances, unweighted_mean

UNKNOWN_NUM_UPDATES = 2**31  # updates in a round: checked again when they are there


def krum(*, num_malicious: int | None = None, num_to_keep: int = 1, clients_per_round: int | None = None) -> Strategy:
    """Move the global model by the update with the lowest score, or by the mean of the ``num_to_keep`` lowest.

    ``s(i) = sum_{i -> j} ||u_i - u_j||^2`` over the ``n - f - 2`` other updates closest to ``u_i``;
    ``w <- w + (1 / m) sum of the m updates with the lowest scores``

    Args:
        num_malicious: ``f``, how many of a round's clients may be malicious, with ``n >= 2 f + 3`` updates in a round;
            None takes the most that ``n`` allows.
        num_to_keep: ``m``, in [1, n - f - 2]; 1 is Krum, more is multi-Krum.
        clients_per_round: cohort size, drawn uniformly; None takes everyone.

    *Guarantees*: while at most ``f`` clients are malicious, an update whose squared distance to each honest one is more
    than ``(n - f - 2) / (n - 2 f - 1)`` times the largest between two honest ones is never chosen.

    Reference: Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent*, NeurIPS 2017, arXiv:1703.02757, section 4.
    """
    require(is_count(num_to_keep), "num_to_keep", num_to_keep, "a whole number >= 1", "num_to_keep=1")

    def checked(num_updates: int) -> int:
        f = resolve_num_malicious(num_malicious, num_updates, per_malicious=2)
        most = max(1, num_updates - f - 2)
        expected = f"at most n - num_malicious - 2 = {most} of {num_updates} updates"
        require(num_to_keep <= most, "strategy.num_to_keep", num_to_keep, expected, f"strategy.num_to_keep={most}")
        return f

    def rule(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        order_K = rank_by_krum(squared_distances(updates.delta_KD), checked(len(updates)))
        return unweighted_mean(updates.delta_KD[order_K[:num_to_keep]]), state

    checked(clients_per_round or UNKNOWN_NUM_UPDATES)
    return Strategy(select=uniform(clients_per_round), aggregate=stacked(rule))
