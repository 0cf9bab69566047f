"""Train and evaluate PyTorch models, also with DP-SGD."""

from fedlearn.trainers.torch.torch_metrics import from_torchmetrics
from fedlearn.trainers.torch.trainer import TorchTrainer

__all__ = ["TorchTrainer", "from_torchmetrics"]
