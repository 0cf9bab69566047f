"""FedALA: each client mixes the global model and its last model with trained weights, and starts there."""

from fedlearn import LocalRule, Strategy, mean, uniform
from fedlearn.algorithm import LocalAggregation, PersonalModel, parameter_patterns
from fedlearn.extend import is_count, is_number, require


def fedala(
    *,
    adaptive_parameters: str | tuple[str, ...] = "out.*",
    learning_rate: float = 1.0,
    start_epochs: int = 20,
    tolerance: float = 0.01,
    clients_per_round: int | None = None,
    weighting: str = "examples",
) -> Strategy:
    """Start local training at ``v_k + W_k (w - v_k)``; train the weights ``W_k`` in [0, 1] on the client's examples.

    ``W_k <- clip(W_k - learning_rate (w - v_k) grad F_k);  w <- sum_k (n_k / n) v_k``, with the client's new model
    ``v_k``, which is also its personal model

    The weights have one value per parameter of the higher layers. Lower layers start at the global model. A client
    trains its weights until the loss converges when it first has two models, and for one pass in all later rounds. The
    paper draws a share of the examples for these passes; here they use all examples.

    Args:
        adaptive_parameters: name patterns of the parameters with weights.
        learning_rate: eta, learning rate of the weights, >= 0; 0 starts at the global model.
        start_epochs: maximum number of passes when a client first trains its weights, >= 1.
        tolerance: these passes end when the loss falls by less than this share, >= 0.
        clients_per_round: cohort size, drawn uniformly; None selects all clients.
        weighting: ``examples`` or ``equal``.

    *Guarantees*: weights never leave a client, and the server works as in FedAvg.

    Reference: Zhang, Hua, Wang, Song, Xue, Ma, Guan, *FedALA: Adaptive Local Aggregation for Personalized Federated
    Learning*, AAAI 2023, arXiv:2212.01197, Algorithm 1.
    """
    patterns = parameter_patterns(adaptive_parameters, name="adaptive_parameters")
    for name, number in (("learning_rate", learning_rate), ("tolerance", tolerance)):
        require(is_number(number, at_least=0), name, number, "a number >= 0", f"{name}=1.0")
    require(is_count(start_epochs), "start_epochs", start_epochs, "a whole number >= 1", "start_epochs=20")
    aggregation = LocalAggregation(patterns, learning_rate, start_epochs, tolerance)
    local = LocalRule(personal=PersonalModel(), aggregation=aggregation)
    return Strategy(select=uniform(clients_per_round), local=local, aggregate=mean(weighting=weighting))
