"""FedGKD: clients distil the mean of the last global models."""

from fedlearn import Array, Context, Layout, LocalRule, State, Strategy, Transform, mean, uniform
from fedlearn.algorithm import Batch
from fedlearn.extend import array_namespace, as_numpy, is_count, is_number, log_softmax, require, zeros


def fedgkd(
    *, gamma: float = 0.2, num_models: int = 5, clients_per_round: int | None = None, weighting: str = "examples"
) -> Strategy:
    """Run FedAvg with the local loss ``CE + gamma / 2 KL(p(w_mean) || p(w))``.

    ``w_mean`` is the mean of the last global models; the initial model stands for models before it. The server sends
    ``w_t - w_mean`` beside ``w_t``.

    Args:
        gamma: weight of the distillation, >= 0.
        num_models: number of global models in the mean, >= 2.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Yao, Pan, Dai, Wan, Ding, Yu, Jin, Xu, Sun, *FedGKD: Towards Heterogeneous Federated Learning via Global
    Knowledge Distillation*, IEEE Transactions on Computers 2024, arXiv:2107.00051, equations 3 and 4.
    """
    require(is_number(gamma, at_least=0), "gamma", gamma, "a number >= 0", "gamma=0.2")
    require(is_count(num_models, at_least=2), "num_models", num_models, "a whole number >= 2", "num_models=5")
    names = [f"step_{i}" for i in range(1, num_models)]  # the last steps of the server, the newest first

    def init(layout: Layout) -> State:
        return {name: zeros(layout) for name in names}

    def keep(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        return update_D, dict(zip(names, [as_numpy(update_D), *map(state.get, names)], strict=False))

    def lag(state: State) -> State:
        return {"lag": sum((1 - i / num_models) * state[name] for i, name in enumerate(names, start=1))}

    def distill(batch: Batch, w_global: Array, lag: Array) -> Array:
        xp, models = array_namespace(batch.outputs), (batch.run(w_global - lag), batch)
        log_p, log_q = (log_softmax(model.outputs) for model in models)
        return gamma / 2 * xp.sum(xp.exp(log_p) * (log_p - log_q), axis=-1)

    local, server = LocalRule(penalty=distill, receives=("lag",)), Transform(init=init, update=keep, broadcast=lag)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting), server=server)
