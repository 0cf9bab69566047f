"""FedSA-LoRA: clients share the factor A of each adapter, and keep the factor B."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import parameter_patterns


def fedsa_lora(
    *,
    personal_parameters: str | tuple[str, ...] = "*lora_B.*",
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Train both factors, and average only A: ``A <- sum_k (n_k / n) A_k;  B_k`` stays at client k.

    A learns features that all clients use, and B learns how a client uses them.

    Args:
        personal_parameters: name patterns of the parameters that stay at the clients; all others are shared. The
            default matches the factors B of peft, for example ``layer.0.query.lora_B.default.weight``.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: no update contains a factor B, and each client is evaluated with its own.

    Reference: Guo, Zeng, Wang, Fan, Wang, Qu, *Selective Aggregation for Low-Rank Adaptation in Federated Learning*,
    ICLR 2025, arXiv:2410.01463, Section 4.
    """
    return Strategy(
        select=uniform(clients_per_round),
        local=LocalRule(personal_parameters=parameter_patterns(personal_parameters)),
        aggregate=mean(weighting=weighting),
    )
