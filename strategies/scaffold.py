"""SCAFFOLD: control variates of clients and server remove client drift."""

from fedlearn import Array, Context, LocalRule, State, Strategy, Transform, mean, uniform
from fedlearn.extend import asarray_like, zeros


def scaffold(*, clients_per_round: int | None = None, weighting: str = "equal") -> Strategy:
    """Correct each local step by the difference of the client's and the server's control variates.

    ``y <- y - eta (grad F_k(y) - c_k + c);  c_k' = c_k - c + (x - y) / (S eta);``
    ``x <- x + (1 / |P|) sum_P (y_k - x);  c <- c + (1 / N) sum_P (c_k' - c_k)``

    ``c_k`` is a client state, and clients send ``c_k' - c_k`` beside the update. ``c_k'`` (option II) is the mean
    gradient of the round for plain SGD only, so other optimizers and momentum are refused.

    Args:
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``equal`` as in the paper, or ``examples``: the means over P have the weights ``n_k / n``, as in
            FLamby. Then the mean of ``c_k' - c_k`` is computed from the mean update, for equal numbers of steps.

    *Guarantees*: for convex problems the limit depends neither on client differences nor on the number of local steps.

    Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, *SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning*, ICML 2020, arXiv:1910.06378, Algorithm 1.
    """

    def finish(
        delta_KD: Array, num_steps_K: Array, learning_rate: float, client_control: Array, server: Array
    ) -> tuple:
        change_KD = -server - delta_KD / (num_steps_K[:, None] * learning_rate)
        return {"client_control": client_control + change_KD}, {"change": change_KD}

    def control(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        share, server = context.cohort_size / context.num_clients, asarray_like(state["server"], update_D)
        if weighting == "equal":
            return update_D, {"server": server + share * context.extra["change"]}
        return update_D, {"server": server - share * (server + update_D / (context.num_steps * context.learning_rate))}

    rule = LocalRule(
        correct=lambda grad, w, w_global, client_control, server: grad - client_control + server,
        client_state=("client_control",),
        receives=("server",),
        after_training=finish,
        requires_sgd=True,
    )
    server = Transform(
        init=lambda layout: {"server": zeros(layout)},
        update=control,
        broadcast=lambda state: {"server": state["server"]},
        reads_num_steps=weighting == "examples",
    )
    return Strategy(select=uniform(clients_per_round), local=rule, aggregate=mean(weighting=weighting), server=server)
