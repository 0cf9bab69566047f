"""Train a model on the data of ten clients, in ten lines."""

from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from strategies import fedavg

images, labels = load_digits(return_X_y=True)
data = fedlearn.from_arrays(images / 16, labels, assignment=[i % 10 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.TorchTrainer(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), task="multiclass")
scenario = fedlearn.Scenario(name="digits", data=data, trainer=trainer)
strategy, engine = fedavg(clients_per_round=5), fedlearn.vector(data, trainer)
state = fedlearn.start(strategy, trainer.init(1), engine, seed=1)
schedule, local = fedlearn.Schedule(rounds=10), fedlearn.LocalSettings(learning_rate=0.5)

for round in fedlearn.federate(
    strategy, engine, state, schedule=schedule, local=local, evaluate=fedlearn.judge(scenario)
):
    print(f"round {round.number:2}: accuracy {round.evaluation.pooled['accuracy']:.1%}")
