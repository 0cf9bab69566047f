"""pfl-research, CIFAR-10: IID with and without central privacy."""

from __future__ import annotations

from simulations.published.measures import final_accuracy
from simulations.published.records import Row, Table


def _row(name: str, label: str, settings: str) -> Row:
    words = ("experiment=pfl_research_cifar10", *settings.split())
    return Row(name=name, label=label, settings=words, measures=(final_accuracy(),))


TABLE = Table(
    name="pfl_research_cifar10",
    title="CIFAR-10 as in pfl-research",
    paper=(
        "Granqvist et al., *pfl-research: Simulation Framework for Accelerating Research in Private Federated "
        "Learning*, NeurIPS 2024 Datasets and Benchmarks, arXiv:2404.06430"
    ),
    protocol=(
        "Settings of benchmarks/image_classification/configs/baseline.yaml in apple/pfl-research: 1,000 clients "
        "with 50 images, 50 clients per round, equal weights. Clients train for one epoch in batches of 10 at "
        "learning rate 0.1. Central privacy has clip norm 0.4, epsilon 2 and delta 1e-6. The network is "
        "`simple_cnn` with dropout. The paper draws initial weights after Glorot; here they are torch's. The "
        "noise is for the cohort of 50, while the paper rescales the noise of a cohort of 1,000. The published "
        "accuracies could not be checked. The images are 170 MB from the official server, which needs internet "
        "access. No package of PyPI, npm or Debian with all images was found."
    ),
    data="python -m simulations.data fetch cifar10",
    rows=(
        _row("iid", "IID", "rounds=1500"),
        _row(
            "iid_central_dp",
            "IID, epsilon 2",
            "rounds=1500 privacy=central privacy.clip_norm=0.4 privacy.epsilon=2 privacy.delta=1e-6",
        ),
    ),
)
