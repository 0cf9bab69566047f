"""ProxSkip (Scaffnew): local steps with control variates, and a random number of steps between rounds."""

from fedlearn import Array, Context, LocalRule, State, Strategy, Transform, everyone, mean
from fedlearn.extend import is_number, require, zeros


def proxskip(*, probability: float = 0.2) -> Strategy:
    """Take local steps along ``grad F_k(w) - h_k``; after each step, all clients communicate with a probability ``p``.

    ``w <- (1 / K) sum_k w_k;  h_k <- h_k + (p / eta) (w - w_k)``

    The number of steps of a round is geometric with the mean ``1 / p``, and the same for all clients. Therefore,
    ``local.steps`` and more than one of ``local.epochs`` are refused. All clients take part. This is correct for plain
    SGD, so other optimizers and momentum are refused. A client that misses a round keeps an old ``h_k``.

    Args:
        probability: ``p``, in (0, 1].

    *Guarantees*: for strongly convex objectives and full gradients, the limit is the optimum of the mean objective,
    for any number of local steps.

    Reference: Mishchenko, Malinovsky, Stich, Richtarik, *ProxSkip: Yes! Local Gradient Steps Provably Lead to
    Communication Acceleration! Finally!*, ICML 2022, arXiv:2202.09357, Algorithm 2 (Scaffnew).
    """
    is_valid = is_number(probability, at_least=0) and 0 < probability <= 1
    require(is_valid, "probability", probability, "a number in (0, 1]", "probability=0.2")

    def finish(delta_KD: Array, num_steps_K: Array, learning_rate: float, control: Array, shift: Array) -> tuple:
        return {"control": control + shift - probability / learning_rate * delta_KD}, {}

    def step(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        return update_D, {"shift": probability / context.learning_rate * update_D}

    rule = LocalRule(
        correct=lambda grad, w, w_global, control, shift: grad - control - shift,
        client_state=("control",),
        receives=("shift",),
        after_training=finish,
        num_steps=lambda round, rng: int(rng.geometric(probability)),
        requires_sgd=True,
    )
    server = Transform(init=lambda layout: {"shift": zeros(layout)}, update=step, broadcast=dict)
    return Strategy(select=everyone(), local=rule, aggregate=mean(weighting="equal"), server=server)
