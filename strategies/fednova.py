"""FedNova: each update is divided by the weight of its gradients before the average."""

from fedlearn import Aggregator, Array, LocalRule, State, Strategy, Updates, uniform
from fedlearn.extend import add_rows, add_totals, divide_total, gradient_weight, is_number, require


def fednova(*, clients_per_round: int | None = None, momentum: float = 0.0) -> Strategy:
    """Average the updates per step, and multiply by the mean number of steps.

    ``w <- w + a sum_k p_k (w_k - w) / a_k``, ``a = sum_k p_k a_k``, ``p_k = n_k / n``

    ``a_k`` is the number of local steps. With momentum, it is the sum of the weights of their gradients
    (`fedlearn.extend.gradient_weight`). This is correct for SGD, so other optimizers are refused.

    Args:
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        momentum: momentum of local SGD, in [0, 1), equal to ``local.momentum``.

    *Guarantees*: equal to FedAvg if all clients take the same number of steps. Otherwise it minimizes
    ``sum_k p_k F_k``, whereas FedAvg favors clients with more steps.

    Raises:
        SettingError: ``momentum`` is out of range.

    Reference: Wang, Liu, Liang, Joshi, Poor, *Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization*, NeurIPS 2020, arXiv:2007.07481, sections 4 and 5.
    """
    require(is_number(momentum, at_least=0, below=1), "momentum", momentum, "in [0, 1)", "momentum=0.9")

    def add(partial: State, updates: Updates) -> State:
        examples_K = updates.num_examples_K.astype(float)
        weights_K = gradient_weight(updates.num_steps_K.astype(float), momentum)
        return {
            "total": add_rows(partial["total"], updates.delta_KD, examples_K / weights_K),
            "weights": partial["weights"] + float(examples_K @ weights_K),
            "examples": partial["examples"] + float(examples_K.sum()),
        }

    def finalize(partial: State) -> Array:
        mean_weight = partial["weights"] / partial["examples"]
        return divide_total(partial["total"], partial["examples"] / mean_weight)

    def merge(first: State, second: State) -> State:
        counts = {name: first[name] + second[name] for name in ("weights", "examples")}
        return {"total": add_totals(first["total"], second["total"]), **counts}

    def empty(layout: object) -> State:
        return {"total": None, "weights": 0.0, "examples": 0.0}

    aggregate = Aggregator(init=empty, add=add, finalize=finalize, merge=merge, is_sum=True)
    rule = LocalRule(requires_sgd=True, momentum=momentum)
    return Strategy(select=uniform(clients_per_round), local=rule, aggregate=aggregate)
