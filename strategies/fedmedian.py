"""The coordinate-wise median of the clients' updates."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.robust import coordinate_median


def fedmedian(*, clients_per_round: int | None = None) -> Strategy:
    """Move the global model by the median update: ``w <- w + median_k (w_k - w)``, coordinate by coordinate.

    Every client counts the same: the number of its examples is for a malicious client to choose.

    Args:
        clients_per_round: cohort size, drawn uniformly; None takes everyone.

    *Guarantees*: while fewer than half of a round's clients are malicious, each coordinate of the step lies within the
    range of the honest clients' updates.

    Reference: Yin, Chen, Ramchandran, Bartlett, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates*, ICML 2018, arXiv:1803.01498, Definition 1.
    """

    def median(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        return coordinate_median(updates.delta_KD), state

    return Strategy(select=uniform(clients_per_round), aggregate=stacked(median))
