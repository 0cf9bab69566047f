"""FedAsync: the server mixes in each model as it arrives, the less the older it is."""

from fedlearn import Array, Context, State, Strategy, Transform, everyone, proximal
from fedlearn.algorithm import Asynchrony, staleness_weight
from fedlearn.extend import asarray_like, is_number, require


def fedasync(
    *,
    mixing: float = 0.6,
    mu: float = 0.005,
    staleness: str = "polynomial",
    exponent: float = 0.5,
    slope: float = 10.0,
    grace: float = 4.0,
    concurrency: int = 10,
) -> Strategy:
    """Mix in each model: ``w <- (1 - alpha s(t - tau)) w + alpha s(t - tau) w_k``, with ``w_k`` from ``w_tau``.

    Clients minimise ``F_k(w) + mu/2 ||w - w_tau||^2``; ``t - tau`` counts the server's steps in between.

    Args:
        mixing: alpha, in (0, 1].
        mu: >= 0.
        staleness: s, ``polynomial``: ``(t - tau + 1)^-exponent``, ``hinge``: 1 up to ``grace`` steps and
            ``1 / (slope (t - tau - grace) + 1)`` beyond, or ``constant``: 1.
        exponent: >= 0.
        slope: >= 0.
        grace: >= 0.
        concurrency: clients at work at a time, >= 1; all where there are fewer.

    Reference: Xie, Koyejo, Gupta, *Asynchronous Federated Optimization*, OPT 2020, arXiv:1903.03934, Algorithm 1.
    """
    share = is_number(mixing, at_least=0) and 0 < mixing <= 1
    require(share, "mixing", mixing, "a share in (0, 1]", "mixing=0.6")
    s = staleness_weight(staleness, exponent=exponent, slope=slope, grace=grace)

    def mix(update_D: Array, memory: State, context: Context) -> tuple[Array, State]:
        alpha = mixing * float(s(context.staleness_K)[0])  # the buffer has one update
        arrived_D = asarray_like(context.sent_D, update_D) + update_D
        return alpha * (arrived_D - asarray_like(context.params_D, update_D)), memory

    return Strategy(
        select=everyone(),
        local=proximal(mu),
        server=Transform(update=mix),
        asynchrony=Asynchrony(buffer_size=1, concurrency=concurrency),
    )
