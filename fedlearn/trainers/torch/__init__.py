"""Train PyTorch models."""

from fedlearn.trainers.torch.trainer import TorchTrainer

__all__ = ["TorchTrainer"]
