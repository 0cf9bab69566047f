"""Bucketing: a robust rule gets the means of random groups of updates."""

from fedlearn import Array, Context, Strategy, Updates
from fedlearn.extend import is_count, require
from fedlearn.robust import bucket_weights, random_permutation, with_pre_aggregation
from strategies.rfa import rfa


def bucketing(*, rule: Strategy | None = None, size: int = 2, clients_per_round: int | None = None) -> Strategy:
    """Apply a robust rule to the means of buckets of ``size`` updates, drawn at random in each round.

    Args:
        rule: any strategy with a robust rule; None is `rfa`. It gets ``n / size`` means, and each malicious client can
            spoil one of them.
        size: ``s``, number of clients per bucket, >= 1; the last bucket may have fewer.
        clients_per_round: cohort size, drawn uniformly; None keeps the selector of the rule.

    *Guarantees*: the variance of the bucket means is the variance of honest updates divided by ``size``.

    Reference: Karimireddy, He, Jaggi, *Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing*, ICLR 2022,
    arXiv:2006.09365, Algorithm 1.
    """
    require(is_count(size), "size", size, "a whole number of clients >= 1", "size=2")

    def weights(updates: Updates, context: Context) -> Array:
        return bucket_weights(random_permutation(updates.clients_K, context), size)

    return with_pre_aggregation(weights, rule or rfa(), clients_per_round=clients_per_round)
