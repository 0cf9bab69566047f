"""q-FFL on generated data: mean, worst and best tenth, and variance of the accuracies of clients."""

from __future__ import annotations

from simulations.published.measures import fairness
from simulations.published.records import Row, Table

STATEMENT = (
    "With each seed, the variance is smaller than with q = 0. The worst tenth is better with seeds 1 and 3, and worse "
    "with seed 2 (11.75 instead of 12.47)."
)


def _row(name: str, label: str, settings: str, note: str = "") -> Row:
    words = ("experiment=synthetic_qffl", "framework=jax", *settings.split(), "report=false", "checkpoint_every=100000")
    return Row(name=name, label=label, settings=words, measures=fairness(), note=note, has_published=False)


TABLE = Table(
    name="qffl_synthetic",
    title="Fair federated learning on Synthetic(1, 1)",
    paper=(
        "Li, Sanjabi, Beirami, Smith, *Fair Resource Allocation in Federated Learning*, ICLR 2020, arXiv:1905.10497"
    ),
    protocol=(
        "Not the experiment of the paper. Its repository (litian96/fair_flearn) suggests 20,000 rounds, samples "
        "clients by their size (flearn/trainers/fedbase.py), and has one data set with five splits. Here, there "
        "are 2,000 rounds with uniform sampling, and each seed generates its data. The 100 clients are generated "
        "as in data/synthetic/generate_synthetic.py, and hold out 10 % of their examples. "
        "The model is logistic regression, with 10 clients per round and one epoch in batches of 10 at learning "
        "rate 0.1. The repository does not have the values of Table 1 of the paper, and no other source could "
        "be read, so there is no gate. The paper claims that q > 0 has a smaller variance and a better worst "
        "tenth than q = 0."
    ),
    rows=(
        _row("q0", "q = 0 (FedAvg with equal weights)", "strategy.q=0"),
        _row("q1", "q = 1", "strategy.q=1", STATEMENT),
    ),
)
