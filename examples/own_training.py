"""Train a network of your own with a data set, a loss and a schedule of your own."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

import fedlearn


class NoisyDigits(Dataset):
    """Add noise to the images of a client, when they are read."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        return self.images[index] + 0.1 * noise, self.labels[index]


class SmallCNN(nn.Module):
    """Classify images of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.out = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x):
        """Return one output per class."""
        return self.out(nn.functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1))


def focal_loss(outputs, targets):
    """Return the loss of each example; examples with a high probability count less (Lin et al., ICCV 2017)."""
    cross_entropy_N = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - torch.exp(-cross_entropy_N)) ** 2 * cross_entropy_N


images, labels = load_digits(return_X_y=True)
images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
clients = {f"clinic {k}": NoisyDigits(images[k::6], torch.tensor(labels[k::6])) for k in range(6)}
torch.manual_seed(1)
scenario = fedlearn.Scenario.from_datasets(clients, model=SmallCNN(), loss=focal_loss, num_classes=10)
local = {"optimizer": "adam", "learning_rate": 0.01, "schedule": "cosine", "epochs": 2, "max_grad_norm": 1.0}
result = fedlearn.run(scenario, "fedavg", rounds=5, local=local, show=False)
print(result.metrics[["round", "loss", "accuracy", "accuracy_worst10"]].round(3).to_string(index=False))
