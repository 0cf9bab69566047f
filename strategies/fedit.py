"""FedIT: federated averaging of the two factors of each adapter, and of the head."""

from fedlearn import Strategy, mean
from fedlearn.algorithm import get_selector


def fedit(*, clients_per_round: int | None = None, weighting: str = "examples", select: str = "uniform") -> Strategy:
    """Average both factors of the adapters: ``A <- sum_k (n_k / n) A_k;  B <- sum_k (n_k / n) B_k``.

    The base model is frozen, so clients send adapters and head only. The product of the mean factors is not the mean of
    the products; see `ffa_lora` and `flora`.

    Args:
        clients_per_round: cohort size; None selects all clients.
        weighting: ``examples`` (in proportion to the training examples n_k) or ``equal``.
        select: ``uniform``, ``poisson``, ``weighted`` or ``round_robin``, as in `fedavg`.

    Reference: Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen, *Towards Building the FederatedGPT: Federated
    Instruction Tuning*, ICASSP 2024, arXiv:2305.05644, Algorithm 1.
    """
    return Strategy(select=get_selector(select, clients_per_round), aggregate=mean(weighting=weighting))
