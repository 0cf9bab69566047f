"""Protect all data of each client: clip the updates and add noise at the server, within a budget."""

from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from fedlearn.privacy import Population, central
from strategies import fedavg

images, labels = load_digits(return_X_y=True)
data = fedlearn.from_arrays(images / 16, labels, assignment=[i % 90 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.TorchTrainer(nn.Linear(64, 10), task="multiclass")
mechanism = central(clip_norm=0.5, epsilon=8.0, delta=1e-3)
strategy, local = mechanism.protect(
    fedavg(weighting="equal", clients_per_round=30),
    fedlearn.LocalSettings(learning_rate=0.5),
    Population(clients=data.clients, rounds=15),
)
engine = fedlearn.vector(data, trainer)

for round in fedlearn.federate(
    strategy,
    engine,
    fedlearn.start(strategy, trainer.init(1), engine, seed=1),
    schedule=fedlearn.Schedule(rounds=15, evaluate_every=5),
    local=local,
    evaluate=fedlearn.judge(fedlearn.Scenario(name="digits", data=data, trainer=trainer)),
):
    if round.evaluation:
        epsilon = round.privacy.value
        accuracy = round.evaluation.pooled["accuracy"]
        print(f"round {round.number:2}: accuracy {accuracy:.1%}, epsilon {epsilon:.2f} for each client")
