"""FedLC: the loss is calibrated to the class frequencies of each client."""

from fedlearn import Array, LocalRule, Strategy, mean, uniform
from fedlearn.extend import is_number, require


def fedlc(*, tau: float = 1.0, clients_per_round: int | None = None, weighting: str = "examples") -> Strategy:
    """Run FedAvg with a margin for each class in the local loss: the cross-entropy of ``f_c(x) - tau n_k,c^(-1/4)``.

    ``n_k,c`` is the number of the client's training examples of class c. The margin almost removes a class without
    examples from the loss. So the client does not unlearn a class that only other clients have.

    Args:
        tau: scale of the margins, >= 0; 0 is FedAvg.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    Reference: Zhang, Li, Li, Xu, Wu, Ding, Wu, *Federated Learning with Label Distribution Skew via Logits
    Calibration*, ICML 2022, arXiv:2209.00189, equation 8.

    Unlike in equation 8, the class itself stays in the sum, as in the code of the paper.
    """
    require(is_number(tau, at_least=0), "tau", tau, "a number >= 0; 0 is FedAvg", "tau=1.0")

    def calibrate(outputs_BC: Array, counts_C: Array) -> Array:
        margin_C = tau * (counts_C + 1e-8) ** -0.25
        if outputs_BC.shape[-1] == 1:  # one logit for two classes: second minus first
            margin_C = margin_C[1:] - margin_C[:1]
        return outputs_BC - margin_C

    local = LocalRule(adjust_logits=calibrate)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
