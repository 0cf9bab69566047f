"""Nearest neighbor mixing: a robust rule gets the mean of the nearest neighbors of each update."""

from fedlearn import Array, Context, Strategy, Updates
from fedlearn.robust import nearest_neighbor_weights, resolve_num_malicious, squared_distances, with_pre_aggregation
from strategies.fedtrimmedavg import fedtrimmedavg

UNKNOWN_NUM_UPDATES = 2**31  # used if the cohort size is unknown; each round checks again


def nnm(
    *, rule: Strategy | None = None, num_malicious: int | None = None, clients_per_round: int | None = None
) -> Strategy:
    """Apply a robust rule after each update is replaced by the mean of the ``n - f`` updates closest to it.

    Args:
        rule: any strategy with a robust rule; None is `fedtrimmedavg`.
        num_malicious: ``f``, number of malicious clients per round to tolerate, with ``n > 2 f`` updates in a round;
            None takes the largest possible number.
        clients_per_round: cohort size, drawn uniformly; None keeps the selector of the rule.

    *Guarantees*: the variance of the honest updates falls by a factor of about ``f / n``, and their mean moves little.
    So a robust rule mistakes less heterogeneity for an attack.

    Reference: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, *Fixing by Mixing: A Recipe for Optimal Byzantine
    ML under Heterogeneity*, AISTATS 2023, arXiv:2302.01772, Algorithm 2.
    """

    def num_malicious_in(num_updates: int) -> int:
        return resolve_num_malicious(num_malicious, num_updates, per_malicious=2, offset=1)

    def weights(updates: Updates, context: Context) -> Array:
        num = len(updates)
        return nearest_neighbor_weights(squared_distances(updates.delta_KD), num - num_malicious_in(num))

    num_malicious_in(clients_per_round or UNKNOWN_NUM_UPDATES)
    return with_pre_aggregation(weights, rule or fedtrimmedavg(), clients_per_round=clients_per_round)
