"""Bulyan: repeated Krum, then a trimmed mean of the selected updates."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.robust import mean_around_median, resolve_num_malicious, select_by_krum, squared_distances

UNKNOWN_NUM_UPDATES = 2**31  # updates in a round: checked again when they are there


def bulyan(*, num_malicious: int | None = None, clients_per_round: int | None = None) -> Strategy:
    """Move the global model, in each coordinate, by the mean of the values closest to the median of selected updates.

    1. ``S``: ``theta = n - 2 f`` updates, each chosen by Krum among those not chosen yet;
    2. ``w <- w + `` in each coordinate the mean of the ``beta = theta - 2 f`` values of ``S`` closest to its median.

    Args:
        num_malicious: ``f``, how many of a round's clients may be malicious, with ``n >= 4 f + 3`` updates in a round;
            None takes the most that ``n`` allows.
        clients_per_round: cohort size, drawn uniformly; None takes everyone.

    *Guarantees*: while at most ``f`` clients are malicious, the median of ``S`` lies within the range of the honest
    values, and each value that is averaged is no further from it than the furthest honest one.

    ``theta`` is the paper's. Code that its authors published later takes ``n - 2 f - 2``, which leaves Krum at least
    ``2 f + 3`` updates to choose from until the end; here the last of the ``theta`` are chosen from fewer.

    Reference: El Mhamdi, Guerraoui, Rouault, *The Hidden Vulnerability of Distributed Learning in Byzantium*, ICML
    2018, arXiv:1802.07927, section 4.
    """

    def checked(num_updates: int) -> int:
        return resolve_num_malicious(num_malicious, num_updates, per_malicious=4)

    def rule(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        f = checked(len(updates))
        theta = len(updates) - 2 * f
        chosen = select_by_krum(squared_distances(updates.delta_KD), f, theta)
        return mean_around_median(updates.delta_KD[chosen], theta - 2 * f), state

    checked(clients_per_round or UNKNOWN_NUM_UPDATES)
    return Strategy(select=uniform(clients_per_round), aggregate=stacked(rule))
