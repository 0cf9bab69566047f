"""Norm bounding: the server clips the norm of each update."""

from fedlearn import Strategy, mean, uniform
from fedlearn.algorithm import clip_norm, map_updates
from fedlearn.extend import is_number, require


def norm_bounding(*, bound: float = 1.0, clients_per_round: int | None = None) -> Strategy:
    """Move the global model by the mean of the updates, each clipped to norm ``bound`` by the server.

    ``w <- w + (1 / n) sum_k u_k / max(1, ||u_k|| / bound)``

    All clients have equal weights, because a malicious client can report any number of examples. The server
    clips, because a malicious client would not. The mean streams in constant memory.

    Args:
        bound: ``M``, the largest L2 norm of an update, > 0.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: a client moves the global model by at most ``bound / n`` in a round, for any update.

    Reference: Sun, Kairouz, Suresh, McMahan, *Can You Really Backdoor Federated Learning?*, 2019, arXiv:1911.07963,
    section 3.
    """
    require(is_number(bound, at_least=0) and 0 < bound < float("inf"), "bound", bound, "a number > 0", "bound=1.0")
    bounded = map_updates(lambda updates_KD: clip_norm(updates_KD, bound), mean(weighting="equal"))
    return Strategy(select=uniform(clients_per_round), aggregate=bounded)
