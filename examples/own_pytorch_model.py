"""Train a convolutional network of your own. Images are N x height x width x channels."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from strategies import fedavg


class SmallCNN(nn.Module):
    """Classify images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.out = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one output per class."""
        x = torch.tanh(self.conv(x.permute(0, 3, 1, 2)))
        return self.out(nn.functional.avg_pool2d(x, 2).flatten(1))


images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1) / 16
data = fedlearn.from_arrays(images, labels, assignment=[i % 6 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.TorchTrainer(SmallCNN(), task="multiclass")
scenario = fedlearn.Scenario(name="digits", data=data, trainer=trainer)
strategy, engine = fedavg(), fedlearn.vector(data, trainer)

for round in fedlearn.federate(
    strategy,
    engine,
    fedlearn.start(strategy, trainer.init(1), engine, seed=1),
    schedule=fedlearn.Schedule(rounds=5),
    local=fedlearn.LocalSettings(epochs=2, batch_size=16, learning_rate=0.3),
    evaluate=fedlearn.judge(scenario),
):
    print(f"round {round.number}: accuracy {round.evaluation.pooled['accuracy']:.1%}")
