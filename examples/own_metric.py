"""Add a metric of your own: the calibration error, which selects the best model and ends the run early."""

import numpy as np
from sklearn.datasets import load_breast_cancer
from torch import nn

import fedlearn

BINS = 10


def sums(outputs, targets):
    """Return the gap between probability and outcome of each example, in the column of its bin."""
    probability_N = 1 / (1 + np.exp(-outputs[:, 0]))
    bin_N = np.minimum((BINS * probability_N).astype(int), BINS - 1)
    return {"gap": np.eye(BINS)[bin_N] * (probability_N - targets)[:, None]}


def finish(sums):
    """Return the mean over all examples of the gap of their bin. Clients send sums, never outputs."""
    return np.abs(sums["gap"]).sum(axis=-1) / sums["count"]


ece = fedlearn.Metric(name="ece", sums=sums, finish=finish, higher_is_better=False)
x, y = load_breast_cancer(return_X_y=True)
x = (x - x.mean(axis=0)) / x.std(axis=0)
clients = {f"clinic {k}": (x[k::4], y[k::4]) for k in range(4)}
network = nn.Linear(30, 1)
nn.init.zeros_(network.weight)
scenario = fedlearn.Scenario.from_datasets(clients, model=network, task="binary", metrics=[ece], metric="ece")
early_stop = {"early_stop.metric": "ece", "early_stop.patience": 3}
result = fedlearn.run(scenario, "fedavg", rounds=30, settings=early_stop, show=False)
best = result.summary["best_checkpoint"]
print(f"{result.status} after {result.summary['rounds']} rounds")
print(f"calibration error {best['value']:.3f} in round {best['round']}")
