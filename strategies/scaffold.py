"""SCAFFOLD: control variates at clients and server remove client drift."""

from fedlearn import Array, Context, LocalRule, State, Strategy, Transform, mean, uniform
from fedlearn.extend import asarray_like, zeros


def scaffold(*, clients_per_round: int | None = None) -> Strategy:
    """Correct each local step by the difference between the client's and the server's control variate.

    ``y <- y - eta (grad F_k(y) - c_k + c);  c_k' = c_k - c + (x - y) / (S eta);``
    ``x <- x + (1 / |P|) sum_P (y_k - x);  c <- c + (1 / N) sum_P (c_k' - c_k)``

    Clients keep ``c_k`` and send ``c_k' - c_k`` beside the update. ``c_k'`` (option II) is the mean gradient of the
    round only where clients take plain SGD steps (local.optimizer=sgd, local.momentum=0, local.learning_rate > 0).

    Args:
        clients_per_round: cohort size, drawn uniformly; None takes everyone.

    *Guarantees*: for convex problems the limit does not depend on how much clients differ, however many local steps.

    Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, *SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning*, ICML 2020, arXiv:1910.06378, Algorithm 1.
    """

    def finish(
        delta_KD: Array, num_steps_K: Array, learning_rate: float, client_control: Array, server: Array
    ) -> tuple:
        change_KD = -server - delta_KD / (num_steps_K[:, None] * learning_rate)
        return {"client_control": client_control + change_KD}, {"change": change_KD}

    def control(update_D: Array, memory: State, context: Context) -> tuple[Array, State]:
        share = context.cohort_size / context.num_clients
        return update_D, {"server": asarray_like(memory["server"], update_D) + share * context.extra["change"]}

    rule = LocalRule(
        correct=lambda grad, w, w_global, client_control, server: grad - client_control + server,
        client_state=("client_control",),
        receives=("server",),
        after_training=finish,
    )
    server = Transform(
        init=lambda layout: {"server": zeros(layout)},
        update=control,
        broadcast=lambda memory: {"server": memory["server"]},
    )
    return Strategy(select=uniform(clients_per_round), local=rule, aggregate=mean(weighting="equal"), server=server)
