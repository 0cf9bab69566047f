"""FFA-LoRA: the factor A of each adapter is frozen, and clients train and send the factor B."""

from fedlearn import LocalRule, Strategy, mean
from fedlearn.algorithm import get_selector, parameter_patterns


def ffa_lora(
    *,
    frozen_parameters: str | tuple[str, ...] = "*lora_A.*",
    clients_per_round: int | None = None,
    weighting: str = "examples",
    select: str = "uniform",
) -> Strategy:
    """Train the factor B of each adapter, with one random A at all clients: ``B <- sum_k (n_k / n) B_k``.

    Args:
        frozen_parameters: name patterns of the parameters that keep their initial values. The default matches the
            factors A of peft, for example ``layer.0.query.lora_A.default.weight``.
        clients_per_round: cohort size; None selects all clients.
        weighting: ``examples`` (in proportion to the training examples n_k) or ``equal``.
        select: ``uniform``, ``poisson``, ``weighted`` or ``round_robin``, as in `fedavg`.

    *Guarantees*: the product ``B A`` of the new factors is the mean of the products of the clients. No update contains
    a frozen parameter, so clipping and noise apply to the other parameters only. Noise on B moves the product linearly.

    Reference: Sun, Li, Li, Ding, *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024,
    arXiv:2403.12313, Section 4.
    """
    frozen = parameter_patterns(frozen_parameters, name="frozen_parameters")
    return Strategy(
        select=get_selector(select, clients_per_round),
        local=LocalRule(frozen_parameters=frozen),
        aggregate=mean(weighting=weighting),
    )
