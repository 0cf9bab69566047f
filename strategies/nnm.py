"""Nearest neighbor mixing: before a robust rule, the mean of its neighbors replaces each update."""

from fedlearn import Array, Context, Strategy, Updates
from fedlearn.robust import nearest_neighbor_weights, resolve_num_malicious, squared_distances, with_pre_aggregation
from strategies.fedtrimmedavg import fedtrimmedavg

UNKNOWN_NUM_UPDATES = 2**31  # updates in a round: checked again when they are there


def nnm(
    *, rule: Strategy | None = None, num_malicious: int | None = None, clients_per_round: int | None = None
) -> Strategy:
    """Apply a rule to the means of the ``n - f`` updates closest to each update, itself included.

    Args:
        rule: any strategy with a robust rule; None is `fedtrimmedavg`.
        num_malicious: ``f``, how many of a round's clients may be malicious, with ``n > 2 f`` updates in a round; None
            takes the most that ``n`` allows.
        clients_per_round: cohort size, drawn uniformly; None leaves it to the rule.

    *Guarantees*: mixing brings the honest updates closer to each other (their variance falls by a factor of about
    ``f / n``) and moves their mean little, so that rules which take heterogeneity for malice have less of it.

    Reference: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, *Fixing by Mixing: A Recipe for Optimal Byzantine
    ML under Heterogeneity*, AISTATS 2023, arXiv:2302.01772, Algorithm 2.
    """

    def checked(num_updates: int) -> int:
        return resolve_num_malicious(num_malicious, num_updates, per_malicious=2, offset=1)

    def weights(updates: Updates, context: Context) -> Array:
        num = len(updates)
        return nearest_neighbor_weights(squared_distances(updates.delta_KD), num - checked(num))

    checked(clients_per_round or UNKNOWN_NUM_UPDATES)
    return with_pre_aggregation(weights, rule or fedtrimmedavg(), clients_per_round=clients_per_round)
