"""McMahan et al. 2017, MNIST: rounds of FedAvg to 97 % with the 2NN, and to 99 % with the CNN."""

from __future__ import annotations

from simulations.published.measures import best_accuracy_by, rounds_to
from simulations.published.records import Published, Row, Table

SOURCE = (
    "Table 1 of the paper (checked in a public transcription of the table): rounds with C = 0.1, B = 10: "
    "2NN to 97 %: 87 and 664; CNN to 99 %: 18 and 206"
)
FASTER_FRAMEWORK = {"2nn": "jax", "cnn": "torch"}  # on one core of a CPU


def _row(
    name: str,
    label: str,
    settings: str,
    target: float,
    published_rounds: int,
    *,
    seeds: int,
    note: str = "",
    hours: float | None = None,
) -> Row:
    rounds = Published(value=published_rounds, source=SOURCE, gate="limit")
    measures = (rounds_to(target, rounds), best_accuracy_by(published_rounds))
    framework = f"framework={FASTER_FRAMEWORK[name.partition('_')[0]]}"
    words = ("experiment=mnist_fedavg", framework, "report=false", "checkpoint_every=1000", *settings.split())
    numbers = range(1, seeds + 1)
    return Row(name=name, label=label, settings=words, seeds=numbers, measures=measures, note=note, hours=hours)


FASTER = (
    "It needs fewer rounds than published, so it does not reproduce the number. The paper states neither its initial "
    "weights nor its learning rate."
)
CLOSE = "It misses the target, also with learning rate 0.1 (98.70 % by round 18 with seed 1)."

TABLE = Table(
    name="mcmahan_mnist",
    title="Federated averaging on MNIST",
    paper=(
        "McMahan, Moore, Ramage, Hampson, Agüera y Arcas, *Communication-Efficient Learning of Deep Networks "
        "from Decentralized Data*, AISTATS 2017, arXiv:1602.05629"
    ),
    protocol=(
        "100 clients with 600 examples, 10 clients per round, batches of 10. The 2NN has two hidden layers of "
        "200 units and trains for one epoch per round; the CNN (1,663,370 parameters) trains for five. Non-IID: "
        "two shards of 300 examples sorted by digit. The learning rate of the 2NN, 0.215, is on a grid of "
        "factors of the cube root of 10. It was the best of 0.0464, 0.1 and 0.215 for shards on seed 0, which "
        "is not in the table. For the CNN with IID data, 0.215 was the best of 0.1, 0.215 and 0.464 in nine rounds "
        "on seed 0. With shards, it uses 0.1 without a search. The paper publishes the round that reaches the "
        "target, and no accuracy at this round. So each row has to reach the target by the published round."
    ),
    data="python -m simulations.data fetch mnist",
    rows=(
        _row("2nn_iid", "2NN, IID", "rounds=87", 97, 87, seeds=5, note=FASTER),
        _row("2nn_shards", "2NN, two shards", "partition=shards rounds=664", 97, 664, seeds=3, note=FASTER),
        _row(
            "cnn_iid",
            "CNN, IID",
            "model=mcmahan_cnn local.epochs=5 local.learning_rate=0.215 rounds=18",
            99,
            18,
            seeds=3,
            note=CLOSE,
        ),
        _row(
            "cnn_shards",
            "CNN, two shards",
            "model=mcmahan_cnn local.epochs=5 partition=shards local.learning_rate=0.1 rounds=206",
            99,
            206,
            seeds=3,
            hours=1.5,
        ),
    ),
)
