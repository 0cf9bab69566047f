"""Compare three algorithms on clients that have two of ten classes each, and draw their accuracy."""

import matplotlib
from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from fedlearn.data import Shards, partition_rows
from strategies import fedavg, fedprox, scaffold

matplotlib.use("Agg")
import matplotlib.pyplot as plt

images, labels = load_digits(return_X_y=True)
rows = partition_rows(Shards(num_clients=10, classes_per_client=2), labels)
data = fedlearn.from_arrays(images / 16, labels, assignment=rows, task="multiclass")
trainer = fedlearn.TorchTrainer(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), task="multiclass")
evaluate = fedlearn.judge(fedlearn.Scenario(name="digits", data=data, trainer=trainer))

for name, strategy in {"FedAvg": fedavg(), "FedProx": fedprox(mu=0.1), "SCAFFOLD": scaffold()}.items():
    engine = fedlearn.vector(data, trainer)
    rounds = fedlearn.federate(
        strategy,
        engine,
        fedlearn.start(strategy, trainer.init(1), engine, seed=1),
        schedule=fedlearn.Schedule(rounds=15),
        local=fedlearn.LocalSettings(epochs=2, learning_rate=0.2),
        evaluate=evaluate,
    )
    accuracy = [round.evaluation.pooled["accuracy"] for round in rounds]
    plt.plot(range(1, 16), accuracy, label=name)
    print(f"{name:10} {accuracy[-1]:.1%}")

plt.xlabel("round")
plt.ylabel("accuracy")
plt.legend()
plt.savefig("comparison.png")
