"""Train a model on the data of ten clients, in ten lines."""

from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from strategies import fedavg

images, labels = load_digits(return_X_y=True)
data = fedlearn.from_arrays(images / 16, labels, assignment=[i % 10 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.TorchTrainer(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), task="multiclass")
scenario = fedlearn.Scenario(name="digits", data=data, trainer=trainer)
result = fedlearn.run(scenario, fedavg(clients_per_round=5), rounds=10, settings={"local.learning_rate": 0.5})
print(result.metrics[["round", "accuracy"]].tail(3))
print(result.predict(images[:3] / 16))
