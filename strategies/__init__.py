"""One file per paper; every name that they import from fedlearn is public."""

from strategies.bulyan import bulyan
from strategies.fcf import fcf
from strategies.fedadagrad import fedadagrad
from strategies.fedadam import fedadam
from strategies.fedavg import fedavg
from strategies.fedavgm import fedavgm
from strategies.fedmedian import fedmedian
from strategies.fedper import fedper
from strategies.fedprox import fedprox
from strategies.fedtrimmedavg import fedtrimmedavg
from strategies.fedyogi import fedyogi
from strategies.krum import krum

__all__ = [
    "bulyan",
    "fcf",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedmedian",
    "fedper",
    "fedprox",
    "fedtrimmedavg",
    "fedyogi",
    "krum",
]
