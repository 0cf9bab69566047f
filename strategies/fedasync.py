"""FedAsync: the server mixes each arriving model into the global model, with a weight that falls with staleness."""

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
    """Mix each model in: ``w <- (1 - alpha s(t - tau)) w + alpha s(t - tau) w_k``, with ``w_k`` from ``w_tau``.

    Clients minimize ``F_k(w) + mu/2 ||w - w_tau||^2``; ``t - tau`` is the staleness, in server steps.

    Args:
        mixing: alpha, weight of an arriving model, in (0, 1].
        mu: weight of the proximal term, >= 0.
        staleness: s. ``polynomial``: ``(t - tau + 1)^-exponent``. ``hinge``: 1 up to ``grace`` steps, then
            ``1 / (slope (t - tau - grace) + 1)``. ``constant``: 1.
        exponent: exponent of ``polynomial``, >= 0.
        slope: slope of ``hinge``, >= 0.
        grace: number of server steps without a penalty for ``hinge``, >= 0.
        concurrency: number of in-flight requests, >= 1; at most the number of clients.

    Reference: Xie, Koyejo, Gupta, *Asynchronous Federated Optimization*, OPT 2020, arXiv:1903.03934, Algorithm 1.
    """
    is_share = is_number(mixing, at_least=0) and 0 < mixing <= 1
    require(is_share, "mixing", mixing, "a share in (0, 1]", "mixing=0.6")
    s = staleness_weight(staleness, exponent=exponent, slope=slope, grace=grace)

    def mix(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        alpha = mixing * float(s(context.staleness_K)[0])  # the buffer has one update
        arrived_D = asarray_like(context.sent_D, update_D) + update_D
        return alpha * (arrived_D - asarray_like(context.params_D, update_D)), state

    return Strategy(
        select=everyone(),
        local=proximal(mu),
        server=Transform(update=mix),
        asynchrony=Asynchrony(buffer_size=1, concurrency=concurrency),
    )
