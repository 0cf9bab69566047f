"""Send the largest tenth of each update, with error feedback."""

from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from fedlearn.algorithm import with_compression
from fedlearn.compression import topk
from strategies import fedavg

images, labels = load_digits(return_X_y=True)
data = fedlearn.from_arrays(images / 16, labels, assignment=[i % 10 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.TorchTrainer(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)), task="multiclass")
evaluate = fedlearn.judge(fedlearn.Scenario(name="digits", data=data, trainer=trainer))

for name, strategy in {"float32": fedavg(), "top 10 %": with_compression(fedavg(), topk(share=0.1))}.items():
    engine = fedlearn.vector(data, trainer)
    rounds = list(
        fedlearn.federate(
            strategy,
            engine,
            fedlearn.start(strategy, trainer.init(1), engine, seed=1),
            schedule=fedlearn.Schedule(rounds=20),
            local=fedlearn.LocalSettings(learning_rate=0.5),
            evaluate=evaluate,
        )
    )
    sent = sum(round.bytes_up for round in rounds) / 1024
    print(f"{name:8} accuracy {rounds[-1].evaluation.pooled['accuracy']:.1%}, {sent:.0f} KiB sent")
