"""FedMedian: the coordinate-wise median of the updates."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.robust import coordinate_median


def fedmedian(*, clients_per_round: int | None = None) -> Strategy:
    """Move the global model by the median update: ``w <- w + median_k (w_k - w)``, coordinate by coordinate.

    All clients have equal weights, because a malicious client can report any number of examples.

    Args:
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: if less than half of the responding clients are malicious, each coordinate of the step lies within the
    range of the honest updates.

    Reference: Yin, Chen, Ramchandran, Bartlett, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates*, ICML 2018, arXiv:1803.01498, Definition 1.
    """

    def median(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        return coordinate_median(updates.delta_KD), state

    return Strategy(select=uniform(clients_per_round), aggregate=stacked(median))
