"""Bulyan: repeated Krum, then a trimmed mean of the selected updates."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.robust import mean_around_median, resolve_num_malicious, select_by_krum, squared_distances

UNKNOWN_NUM_UPDATES = 2**31  # used if the cohort size is unknown; each round checks again


def bulyan(*, num_malicious: int | None = None, clients_per_round: int | None = None) -> Strategy:
    """Move each coordinate of the model by the mean of the values closest to the median of selected updates.

    1. ``S``: ``theta = n - 2 f`` updates; Krum selects them one by one from the remaining updates.
    2. ``w <- w + u``: each coordinate of ``u`` is the mean of the ``beta = theta - 2 f`` values of ``S`` closest to the
       median.

    Args:
        num_malicious: ``f``, number of malicious clients per round to tolerate, with ``n >= 4 f + 3`` updates in a
            round; None takes the largest possible number.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: with at most ``f`` malicious clients, the median of ``S`` lies within the range of the honest values.
    No averaged value is further from this median than the furthest honest value.

    ``theta`` is the number in the paper. Later code of its authors uses ``n - 2 f - 2``, so Krum always selects from at
    least ``2 f + 3`` updates. Here the last updates are selected from fewer.

    Reference: El Mhamdi, Guerraoui, Rouault, *The Hidden Vulnerability of Distributed Learning in Byzantium*, ICML
    2018, arXiv:1802.07927, section 4.
    """

    def num_malicious_in(num_updates: int) -> int:
        return resolve_num_malicious(num_malicious, num_updates, per_malicious=4)

    def rule(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        f = num_malicious_in(len(updates))
        theta = len(updates) - 2 * f
        selected = select_by_krum(squared_distances(updates.delta_KD), f, theta)
        return mean_around_median(updates.delta_KD[selected], theta - 2 * f), state

    num_malicious_in(clients_per_round or UNKNOWN_NUM_UPDATES)
    return Strategy(select=uniform(clients_per_round), aggregate=stacked(rule))
