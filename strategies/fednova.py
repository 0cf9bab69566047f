"""FedNova: each update is divided by its number of local steps before the average."""

from fedlearn import Aggregator, Array, LocalRule, State, Strategy, Updates, uniform
from fedlearn.extend import add_rows, add_totals, divide_total


def fednova(*, clients_per_round: int | None = None) -> Strategy:
    """Average the updates per step, and multiply by the mean number of steps.

    ``w <- w + tau sum_k p_k (w_k - w) / tau_k``, ``tau = sum_k p_k tau_k``, ``p_k = n_k / n``

    ``tau_k`` is the number of local steps. This is correct for plain SGD, so other optimizers and momentum are refused.

    Args:
        clients_per_round: cohort size, drawn uniformly; None selects all clients.

    *Guarantees*: equal to FedAvg if all clients take the same number of steps. Otherwise it minimizes
    ``sum_k p_k F_k``, whereas FedAvg favors clients with more steps.

    Reference: Wang, Liu, Liang, Joshi, Poor, *Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization*, NeurIPS 2020, arXiv:2007.07481, equation 9 and section 5.
    """

    def add(partial: State, updates: Updates) -> State:
        examples_K, steps_K = updates.num_examples_K.astype(float), updates.num_steps_K.astype(float)
        return {
            "total": add_rows(partial["total"], updates.delta_KD, examples_K / steps_K),
            "steps": partial["steps"] + float(examples_K @ steps_K),
            "examples": partial["examples"] + float(examples_K.sum()),
        }

    def finalize(partial: State) -> Array:
        tau = partial["steps"] / partial["examples"]
        return divide_total(partial["total"], partial["examples"] / tau)

    def merge(first: State, second: State) -> State:
        counts = {name: first[name] + second[name] for name in ("steps", "examples")}
        return {"total": add_totals(first["total"], second["total"]), **counts}

    def empty(layout: object) -> State:
        return {"total": None, "steps": 0.0, "examples": 0.0}

    aggregate = Aggregator(init=empty, add=add, finalize=finalize, merge=merge, is_sum=True)
    rule = LocalRule(requires_sgd=True)
    return Strategy(select=uniform(clients_per_round), local=rule, aggregate=aggregate)
