"""Protect each patient with DP-SGD at four hospitals, and stop before the budget is exceeded."""

from sklearn.datasets import load_breast_cancer
from torch import nn

import fedlearn
from fedlearn.privacy import Population, example
from strategies import fedavg

x, y = load_breast_cancer(return_X_y=True)
x = (x - x.mean(axis=0)) / x.std(axis=0)  # with real hospitals, use public values
data = fedlearn.from_arrays(x, y, assignment=[i % 4 for i in range(len(y))], task="binary")
trainer = fedlearn.TorchTrainer(nn.Linear(30, 1), task="binary")
population = Population(clients=data.clients, rounds=10, num_examples_of=lambda client: len(data.train(client)))
mechanism = example(clip=1.0, epsilon=3.0, delta=1e-4)
settings = fedlearn.LocalSettings(batch_size=32, learning_rate=0.5)
strategy, local = mechanism.protect(fedavg(), settings, population)
engine = fedlearn.vector(data, trainer)

for round in fedlearn.federate(
    strategy,
    engine,
    fedlearn.start(strategy, trainer.init(1), engine, seed=1),
    schedule=fedlearn.Schedule(rounds=10),
    local=local,
    evaluate=fedlearn.judge(fedlearn.Scenario(name="tumours", data=data, trainer=trainer)),
):
    accuracy = round.evaluation.pooled["accuracy"]
    print(f"round {round.number:2}: accuracy {accuracy:.1%}, epsilon {round.privacy.value:.2f} for each patient")
