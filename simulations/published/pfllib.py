"""PFLlib leaderboard, Fashion-MNIST: personalized strategies under pathological and practical label skew."""

from __future__ import annotations

from simulations.published.measures import best_accuracy
from simulations.published.records import Gate, Published, Row, Table

SOURCE = "TsingZ0/PFLlib, docs/benchmark.html, FMNIST"
# strategy -> label, pathological and practical label skew (accuracy and deviation in percent)
PUBLISHED = {
    "fedavg": ("FedAvg", (80.41, 0.08), (85.85, 0.19)),
    "fedprox": ("FedProx", (78.08, 0.15), (85.63, 0.57)),
    "pfedme": ("pFedMe", (99.35, 0.14), (97.25, 0.17)),
    "ditto": ("Ditto", (99.44, 0.06), (97.47, 0.04)),
    "apfl": ("APFL", (99.41, 0.02), (97.25, 0.08)),
    "fedamp": ("FedAMP", (99.42, 0.03), (97.20, 0.06)),
    "fedala": ("FedALA", (99.57, 0.01), (97.66, 0.02)),
}
# estimate from three rounds of 25 steps per client; all images are 10.5 times as many
HOURS = {"fedavg": 12, "fedprox": 15, "pfedme": 15, "ditto": 27, "apfl": 24, "fedamp": 18, "fedala": 51}
PARTITIONS = {
    "pathological": ("partition=pathological", "~partition.alpha", "partition.classes_per_client=2"),
    "practical": ("partition=dirichlet", "partition.alpha=0.1", "partition.self_balancing=true"),
}

ALL_ROUNDS, FIRST_ROUNDS = 2000, 30


def _row(strategy: str, skew: str, published: tuple[float, float], *, rounds: int = ALL_ROUNDS) -> Row:
    """Return the row of a strategy; with fewer than all rounds, its best accuracy is a lower bound."""
    value, deviation = published
    is_whole = rounds == ALL_ROUNDS
    gate: Gate = "difference" if is_whole else "start"
    measure = best_accuracy(Published(value=value, deviation=deviation, source=SOURCE, gate=gate))
    words = ("experiment=pfllib_fashion", *PARTITIONS[skew], "partition.num_clients=20", "partition.test_share=0.25")
    label = PUBLISHED[strategy][0]
    return Row(
        name=f"{skew}_{strategy}" if is_whole else f"{skew}_{strategy}_{rounds}",
        label=f"{label}, {skew}" if is_whole else f"{label}, {skew}, {rounds} rounds",
        settings=(*words, f"strategy={strategy}", *([] if is_whole else [f"rounds={rounds}"])),
        measures=(measure,),
        hours=round(HOURS[strategy] * rounds / ALL_ROUNDS, 2),
    )


TABLE = Table(
    name="pfllib",
    title="PFLlib leaderboard, Fashion-MNIST",
    paper="Zhang et al., *PFLlib*, JMLR 26(50), 2025, arXiv:2312.04992",
    protocol=(
        "Training and test images together are divided among 20 clients, and each client holds out 25 %. All "
        "clients take part in each of 2,000 rounds, with one local epoch in batches of 10 at learning rate "
        "0.005. The network is FedAvgCNN (582,026 parameters). The measure is the best accuracy over rounds on "
        "the held-out images of all clients. Each client has its personal model, if the strategy has such "
        "models. The settings of the strategies are our defaults. The pathological rows are not the exact experiment "
        "(dataset/utils/dataset_utils.py in PFLlib): there, four clients share two classes in random amounts. Here, "
        "each client draws its second class, and the clients of a class divide it equally. The rows of 30 rounds "
        "are the start of the practical rows."
    ),
    data="apt-get install dataset-fashion-mnist",
    rows=tuple(
        _row(strategy, skew, published)
        for strategy, (_, *both) in PUBLISHED.items()
        for skew, published in zip(PARTITIONS, both, strict=True)
    )
    + tuple(
        _row(strategy, "practical", published, rounds=FIRST_ROUNDS) for strategy, (_, _, published) in PUBLISHED.items()
    ),
)
