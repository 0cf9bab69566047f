"""Share the hidden layer and keep the last layer at each client (FedPer)."""

from collections import OrderedDict

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from strategies import fedavg, fedper

images, labels = load_digits(return_X_y=True)
clients = np.arange(len(labels)) % 8
shuffled = (labels + clients) % 10  # each client uses other labels for the digits
data = fedlearn.from_arrays(images / 16, shuffled, assignment=clients, task="multiclass")
net = nn.Sequential(OrderedDict(hidden=nn.Linear(64, 32), tanh=nn.Tanh(), out=nn.Linear(32, 10)))
trainer = fedlearn.TorchTrainer(net, task="multiclass")
evaluate = fedlearn.judge(fedlearn.Scenario(name="digits", data=data, trainer=trainer))

for name, strategy in {"FedAvg": fedavg(), "FedPer": fedper(personal_parameters="out.*")}.items():
    engine = fedlearn.vector(data, trainer)
    *_, last = fedlearn.federate(
        strategy,
        engine,
        fedlearn.start(strategy, trainer.init(1), engine, seed=1),
        schedule=fedlearn.Schedule(rounds=20),
        local=fedlearn.LocalSettings(epochs=3, learning_rate=0.3),
        evaluate=evaluate,
    )
    print(f"{name}: accuracy {last.evaluation.pooled['accuracy']:.1%}")
