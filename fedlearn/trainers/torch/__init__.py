"""Train and evaluate PyTorch models, also with DP-SGD."""

from fedlearn.trainers.torch.trainer import TorchTrainer

__all__ = ["TorchTrainer"]
