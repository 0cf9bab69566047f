"""SCAFFOLD: control variates of clients and server remove client drift."""

from fedlearn import Array, Context, LocalRule, State, Strategy, Transform, mean, uniform
from fedlearn.extend import asarray_like, gradient_weight, is_number, require, zeros

WEIGHTINGS = ("equal", "examples", "updates")


def scaffold(*, clients_per_round: int | None = None, weighting: str = "equal", momentum: float = 0.0) -> Strategy:
    """Correct each local step by the difference of the client's and the server's control variates.

    ``y <- y - eta (grad F_k(y) - c_k + c);  c_k' = c_k - c + (x - y) / (a_k eta);``
    ``x <- x + (1 / |P|) sum_P (y_k - x);  c <- c + (1 / N) sum_P (c_k' - c_k)``

    ``c_k`` is a client state, and clients send ``c_k' - c_k`` beside the update. ``c_k'`` (option II) is the mean
    gradient of the round. ``a_k`` is the number of local steps. With momentum, it is the sum of the weights of the
    gradients (`fedlearn.extend.gradient_weight`), and ``c_k'`` is their weighted mean. Other optimizers are refused.

    Args:
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: weights of the means over P. ``equal`` as in the paper. ``examples``: ``n_k / n`` for both, as in
            FLamby; then the mean of ``c_k' - c_k`` is computed from the mean update, for equal numbers of steps.
            ``updates``: ``n_k / n`` for the updates and equal weights for ``c_k' - c_k``, as in NIID-Bench.
        momentum: momentum of local SGD, in [0, 1), equal to ``local.momentum``. It includes the corrections.

    *Guarantees*: for convex problems the limit depends neither on client differences nor on the number of local steps.

    Raises:
        SettingError: ``weighting`` has another value, or ``momentum`` is out of range.

    Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, *SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning*, ICML 2020, arXiv:1910.06378, Algorithm 1.
    """
    require(weighting in WEIGHTINGS, "weighting", weighting, f"one of {', '.join(WEIGHTINGS)}", "weighting=equal")
    require(is_number(momentum, at_least=0, below=1), "momentum", momentum, "in [0, 1)", "momentum=0.9")

    def finish(
        delta_KD: Array, num_steps_K: Array, learning_rate: float, client_control: Array, server: Array
    ) -> tuple:
        change_KD = -server - delta_KD / (gradient_weight(num_steps_K, momentum)[:, None] * learning_rate)
        return {"client_control": client_control + change_KD}, {"change": change_KD}

    def control(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        share, server = context.cohort_size / context.num_clients, asarray_like(state["server"], update_D)
        if weighting != "examples":
            return update_D, {"server": server + share * context.extra["change"]}
        weight = gradient_weight(context.num_steps, momentum)
        return update_D, {"server": server - share * (server + update_D / (weight * context.learning_rate))}

    rule = LocalRule(
        correct=lambda grad, w, w_global, client_control, server: grad - client_control + server,
        client_state=("client_control",),
        receives=("server",),
        after_training=finish,
        requires_sgd=True,
        momentum=momentum,
    )
    server = Transform(
        init=lambda layout: {"server": zeros(layout)},
        update=control,
        broadcast=lambda state: {"server": state["server"]},
        reads_num_steps=weighting == "examples",
    )
    aggregate = mean(weighting="equal" if weighting == "equal" else "examples")
    return Strategy(select=uniform(clients_per_round), local=rule, aggregate=aggregate, server=server)
