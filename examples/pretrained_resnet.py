"""Fine-tune a residual network whose weights come from a file. Its first layers do not train."""

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from strategies import fedavg


class Block(nn.Module):
    """Add two convolutions to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of the input and the convolutions."""
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    """Classify images of 8 x 8 pixels, which are N x height x width x channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(1, 8, 3, padding=1), Block(8), Block(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one output per class."""
        x = self.layer2(self.layer1(self.stem(x.permute(0, 3, 1, 2))))
        return self.fc(x.mean((2, 3)))


save_file(ResNet(1000).state_dict(), "pretrained.safetensors")  # stands for a file that you download
weights = load_file("pretrained.safetensors")
model = ResNet(10)
model.load_state_dict({name: part for name, part in weights.items() if not name.startswith("fc.")}, strict=False)
model.stem.requires_grad_(False)  # frozen parameters do not travel

images, labels = load_digits(return_X_y=True)
images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
hospitals = {f"site {k}": (images[k::4], labels[k::4]) for k in range(4)}
scenario = fedlearn.Scenario.from_datasets(hospitals, model=model, num_classes=10, name="digits")
local = {"learning_rate": 0.1, "momentum": 0.9, "batch_size": 32}
result = fedlearn.run(scenario=scenario, strategy=fedavg(), buffers="average", local=local, rounds=3, report=False)
assert torch.equal(result.model.stem.weight, weights["stem.weight"]), "the frozen layer has its weights of the file"
print(f"trained: {result.trained_model}")
