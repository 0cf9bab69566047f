"""FedTrimmedAvg: the coordinate-wise trimmed mean of the updates."""

from fedlearn import Array, Context, State, Strategy, Updates, stacked, uniform
from fedlearn.extend import is_number, require
from fedlearn.robust import trimmed_mean


def fedtrimmedavg(*, trim: float = 0.2, clients_per_round: int | None = None) -> Strategy:
    """Move the global model by the mean of each coordinate without its extreme values.

    ``w <- w + 1 / ((1 - 2 trim) K) sum_{k in U} (w_k - w)``. ``U`` omits the ``trim K`` (rounded down) smallest and
    largest values of each coordinate.

    All clients have equal weights, because a malicious client can report any number of examples.

    Args:
        trim: share of the updates to omit at each end, in [0, 0.5); 0 is the mean.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: if at most ``trim K`` clients of a round are malicious, each coordinate of the step lies within the
    range of the honest updates.

    Reference: Yin, Chen, Ramchandran, Bartlett, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates*, ICML 2018, arXiv:1803.01498, Definition 2.
    """
    is_valid = is_number(trim, at_least=0, below=0.5)
    require(is_valid, "trim", trim, "a share in [0, 0.5) of the clients, left out at each end", "trim=0.1")

    def rule(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        num_trimmed = int(trim * len(updates) + 1e-9)  # 1e-9 because 0.29 * 100 is slightly below 29
        return trimmed_mean(updates.delta_KD, num_trimmed), state

    return Strategy(select=uniform(clients_per_round), aggregate=stacked(rule))
