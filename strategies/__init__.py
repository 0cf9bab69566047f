"""One file per paper; every name that they import from fedlearn is public."""

from strategies.bucketing import bucketing
from strategies.bulyan import bulyan
from strategies.centered_clipping import centered_clipping
from strategies.fedadagrad import fedadagrad
from strategies.fedadam import fedadam
from strategies.fedavg import fedavg
from strategies.fedavgm import fedavgm
from strategies.fedmedian import fedmedian
from strategies.fedprox import fedprox
from strategies.fedtrimmedavg import fedtrimmedavg
from strategies.fedyogi import fedyogi
from strategies.fltrust import fltrust
from strategies.krum import krum
from strategies.nnm import nnm
from strategies.norm_bounding import norm_bounding
from strategies.rfa import rfa
from strategies.signsgd import signsgd

__all__ = [
    "bucketing",
    "bulyan",
    "centered_clipping",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedmedian",
    "fedprox",
    "fedtrimmedavg",
    "fedyogi",
    "fltrust",
    "krum",
    "nnm",
    "norm_bounding",
    "rfa",
    "signsgd",
]
