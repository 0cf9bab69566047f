"""Train an autoencoder without labels: the targets are the inputs."""

from itertools import pairwise

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from strategies import fedavg


def reconstruction_error(outputs, y):
    """Return the loss of each example, in arrays of any framework."""
    return ((outputs - y) ** 2).mean(-1)


def error_sums(outputs, targets):
    """Return the squared error and the squared target of each pixel."""
    return {"error": (outputs - targets) ** 2, "power": targets.astype(float) ** 2}


def explained(sums):
    """Return the share of the power of the images that the reconstruction explains."""
    return 1 - sums["error"].sum(axis=-1) / sums["power"].sum(axis=-1)


autoencoder = fedlearn.Task(
    name="autoencoder",
    loss=reconstruction_error,
    metrics=(
        fedlearn.mean_metric("loss", reconstruction_error, higher_is_better=False),
        fedlearn.Metric(name="explained", sums=error_sums, finish=explained),
    ),
    main_metric="explained",
    num_outputs=lambda num_pixels: num_pixels,
)

images = load_digits().data / 16
clients = np.arange(len(images)) % 8
data = fedlearn.from_arrays(images, images, assignment=clients, task=autoencoder)
widths = (64, 32, 8, 32, 64)
layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ELU())]
network = nn.Sequential(*layers[:-1])
trainer = fedlearn.TorchTrainer(network, task=autoencoder)
scenario = fedlearn.Scenario(name="digits", data=data, trainer=trainer)
strategy, engine = fedavg(), fedlearn.vector(data, trainer)
state = fedlearn.start(strategy, trainer.init(1), engine, seed=1)
schedule, local = fedlearn.Schedule(rounds=20), fedlearn.LocalSettings(learning_rate=0.5, momentum=0.9)

for round in fedlearn.federate(
    strategy, engine, state, schedule=schedule, local=local, evaluate=fedlearn.judge(scenario)
):
    if round.number % 5 == 0:
        print(f"round {round.number:2}: explained power {round.evaluation.pooled['explained']:.1%}")
