"""NIID-Bench, Fashion-MNIST: four algorithms under label skew."""

from __future__ import annotations

from simulations.published.measures import final_accuracy
from simulations.published.records import Row, Table

PARTITIONS = {
    "iid": ("IID", "partition=iid"),
    "dirichlet": ("Dirichlet(0.5)", "partition=dirichlet partition.alpha=0.5 partition.self_balancing=true"),
    "labels_2": ("two labels", "partition=pathological partition.classes_per_client=2"),
    "labels_3": ("three labels", "partition=pathological partition.classes_per_client=3"),
}
# label, settings, and estimated hours of a seed, from rounds of one epoch
ALGORITHMS = {
    "fedavg": ("FedAvg", "strategy=fedavg", 0.8),
    "fedprox": ("FedProx", "strategy=fedprox strategy.mu=0.01", 0.85),
    "scaffold": ("SCAFFOLD", "strategy=scaffold strategy.weighting=updates", 0.8),
    "fednova": ("FedNova", "strategy=fednova", 0.8),
}

NOTES = {
    "labels_2_scaffold": (
        "It collapses: 63.6 % after round 25, and 10 % from round 30 on. From then on, the updates of one to three "
        "of ten clients are not finite in most rounds, and the server leaves them out."
    ),
}


def _row(partition: str, algorithm: str) -> Row:
    (skew, division), (label, strategy, hours) = PARTITIONS[partition], ALGORITHMS[algorithm]
    words = ("experiment=niid_bench", *division.split(), "partition.num_clients=10", *strategy.split())
    return Row(
        name=f"{partition}_{algorithm}",
        label=f"{skew}, {label}",
        settings=words,
        measures=(final_accuracy(),),
        note=NOTES.get(f"{partition}_{algorithm}", ""),
        hours=hours,
    )


TABLE = Table(
    name="niid_bench",
    title="NIID-Bench, Fashion-MNIST",
    paper=(
        "Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An Experimental Study*, ICDE 2022, "
        "arXiv:2102.02079"
    ),
    protocol=(
        "Settings of scripts/image-data-without-noise.sh in Xtra-Computing/NIID-Bench: ten clients in each of 50 "
        "rounds, ten local epochs in batches of 64. SGD has rate 0.01, momentum 0.9 and weight decay 1e-5. The "
        "network is `simple-cnn` (44,426 parameters). The measure is the accuracy on the 10,000 test images after "
        "the last round. The values of Table 3 of the paper could not be checked (its README has CIFAR-10 only), so "
        "there is no gate. FedProx uses mu = 0.01; the paper takes the best of four. FedNova counts the weights of "
        "gradients with momentum, as in the paper of FedNova. SCAFFOLD adds its corrections to the gradients, and "
        "its control variates are weighted means of gradients. NIID-Bench adds the corrections after the optimizer, "
        "and its control variates are differences of models per step. Both move a step by the same amount after the "
        "first steps of a round."
    ),
    data="apt-get install dataset-fashion-mnist",
    rows=tuple(_row(partition, algorithm) for partition in PARTITIONS for algorithm in ALGORITHMS),
)
