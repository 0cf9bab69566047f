"""pfl-research, CIFAR-10: IID with and without central privacy."""

from __future__ import annotations

from simulations.published.measures import final_accuracy
from simulations.published.records import Row, Table


def _row(name: str, label: str, settings: str, *, has_published: bool = True) -> Row:
    words = ("experiment=pfl_research_cifar10", *settings.split())
    measures = (final_accuracy(),)
    return Row(name=name, label=label, settings=words, measures=measures, has_published=has_published, hours=2)


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
        "learning rate 0.1. The network is `simple_cnn` with dropout. Initial weights are torch's instead of Glorot's, "
        "and images are scaled to [-1, 1] instead of to mean 0 and variance 1. The images differ, too: "
        "download_preprocess.py reshapes color planes to 32 x 32 x 3 pixels without a change of their order. "
        "The row with epsilon 2 is not the experiment of the paper. Both have clip norm 0.4 and delta 1e-6. "
        "The paper scales down the noise of cohorts of 1,000 in a population of a million. Here, the noise is for "
        "the cohort of 50 of 1,000 clients, so it is larger, and there are 1,500 rounds instead of 3,000. "
        "The published accuracies could not be checked. The images are 170 MB "
        "from the official server, which needs internet access. No package of PyPI, npm or Debian with "
        "all images was found. The estimated times are from random images."
    ),
    data="python -m simulations.data fetch cifar10",
    rows=(
        _row("iid", "IID", "rounds=1500"),
        _row(
            "iid_central_dp",
            "IID, epsilon 2",
            "rounds=1500 privacy=central privacy.clip_norm=0.4 privacy.epsilon=2 privacy.delta=1e-6",
            has_published=False,
        ),
    ),
)
