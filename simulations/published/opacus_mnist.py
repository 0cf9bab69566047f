"""DP-SGD on MNIST, the example of Opacus."""

from __future__ import annotations

from simulations.published.measures import final_accuracy, spent_epsilon
from simulations.published.records import Published, Row, Table

SOURCE = "pytorch/opacus, examples/mnist_README.md, ten runs"


def _row(epsilon: float, accuracy: float, deviation: float, settings: str) -> Row:
    published = Published(value=accuracy, deviation=deviation, source=SOURCE)
    words = ("experiment=mnist_dp_sgd", *settings.split(), "report=false", "checkpoint_every=100", "evaluate_every=100")
    return Row(
        name=f"epsilon_{epsilon:g}".replace(".", "_"),
        label=f"epsilon {epsilon:g}",
        settings=words,
        measures=(final_accuracy(published), spent_epsilon(Published(value=epsilon, source=SOURCE, gate="none"))),
    )


TABLE = Table(
    name="opacus_mnist",
    title="DP-SGD on MNIST",
    paper="Yousefpour et al., *Opacus: User-Friendly Differential Privacy Library in PyTorch*, 2021, arXiv:2109.12298",
    protocol=(
        "One client has the 60,000 training images. The network is that of the example (26,010 parameters), "
        "with Poisson batches of 240 expected examples. Each parameter set has its noise multiplier, clip norm, "
        "learning rate and epochs. A round is an epoch of 250 steps. Delta is 1e-5. The published epsilon "
        "is the bound of Rényi differential privacy with an older conversion. For 3,750, 15,000 and 11,250 steps "
        "at rate 0.004, this conversion gives 1.160, 2.905 and 6.863 here, too. The epsilon of fedlearn is "
        "smaller, because its accountant composes privacy loss distributions."
    ),
    data="python -m simulations.data fetch mnist",
    rows=(
        _row(1.16, 94.63, 0.34, "rounds=15 local.learning_rate=0.25 privacy.noise_multiplier=1.3 privacy.clip=1.5"),
        _row(2.91, 96.78, 0.21, "rounds=60 local.learning_rate=0.15 privacy.noise_multiplier=1.1 privacy.clip=1.0"),
        _row(6.86, 97.09, 0.17, "rounds=45 local.learning_rate=0.25 privacy.noise_multiplier=0.7 privacy.clip=1.5"),
    ),
)
