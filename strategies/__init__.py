"""One file per paper; every name that they import from fedlearn is public."""

from strategies.fedadagrad import fedadagrad
from strategies.fedadam import fedadam
from strategies.fedavg import fedavg
from strategies.fedavgm import fedavgm
from strategies.fedprox import fedprox
from strategies.fedyogi import fedyogi

__all__ = ["fedadagrad", "fedadam", "fedavg", "fedavgm", "fedprox", "fedyogi"]
