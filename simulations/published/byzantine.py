"""Accuracy under attacks of two of ten clients, with robust aggregation rules."""

from __future__ import annotations

from simulations.published.measures import final_accuracy
from simulations.published.records import Row, Table

RULES = {
    "mean": ("mean", "strategy=fedavg strategy.weighting=equal"),
    "median": ("median", "strategy=fedmedian"),
    "krum": ("Krum", "strategy=krum strategy.num_malicious=2"),
    "nnm_krum": (
        "NNM and Krum",
        "strategy=nnm strategy.num_malicious=2 strategy.rule._target_=strategies.krum +strategy.rule.num_malicious=2",
    ),
    "nnm_median": (
        "NNM and median",
        "strategy=nnm strategy.num_malicious=2 strategy.rule._target_=strategies.fedmedian",
    ),
}
ATTACK_SETTINGS = {
    "none": "poisoning=none",
    "alie": "poisoning=alie poisoning.fraction=0.2 poisoning.z=1.5",
    "sign_flip": "poisoning=sign_flip poisoning.fraction=0.2",
    "label_flip": "poisoning=label_flip poisoning.fraction=0.2",
}
ATTACKS = {"none": "no attack", "alie": "ALIE", "sign_flip": "sign flip", "label_flip": "label flip"}


def _row(attack: str, rule: str) -> Row:
    poisoning = ATTACK_SETTINGS[attack].split()
    label, settings = RULES[rule]
    words = ("experiment=mnist_byzantine", *poisoning, *settings.split(), "report=false", "checkpoint_every=1000")
    return Row(
        name=f"{attack}_{rule}",
        label=f"{ATTACKS[attack]}, {label}",
        settings=words,
        measures=(final_accuracy(),),
        has_published=False,
    )


TABLE = Table(
    name="byzantine_mnist",
    title="Two malicious clients of ten, MNIST",
    paper=(
        "Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, *Fixing by Mixing*, AISTATS 2023, "
        "arXiv:2302.01772 (NNM); Baruch, Baruch, Goldberg, *A Little Is Enough*, NeurIPS 2019, arXiv:1902.06156 "
        "(ALIE)"
    ),
    protocol=(
        "Not the experiment of a paper: no published table has two malicious clients of ten with these rules, "
        "so there is no gate. Ten clients have Dirichlet(1) shares of MNIST, and take part in each of 100 "
        "rounds of ten steps in batches of 32. The network is the 2NN of McMahan et al. The measure is the "
        "accuracy on the 10,000 test images after the last round. ALIE has z = 1.5. For two of ten clients, its "
        "formula gives z = 0: the attackers send the mean of the other updates."
    ),
    data="python -m simulations.data fetch mnist",
    rows=tuple(_row(attack, rule) for attack in ATTACKS for rule in RULES),
)
