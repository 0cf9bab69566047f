"""One file per paper; every name that they import from fedlearn is public."""

from strategies.afl import afl
from strategies.apfl import apfl
from strategies.bulyan import bulyan
from strategies.ditto import ditto
from strategies.fedadagrad import fedadagrad
from strategies.fedadam import fedadam
from strategies.fedasync import fedasync
from strategies.fedavg import fedavg
from strategies.fedavgm import fedavgm
from strategies.fedbn import fedbn
from strategies.fedbuff import fedbuff
from strategies.feddyn import feddyn
from strategies.fedexp import fedexp
from strategies.fedlc import fedlc
from strategies.fedmedian import fedmedian
from strategies.fednova import fednova
from strategies.fedper import fedper
from strategies.fedprox import fedprox
from strategies.fedrep import fedrep
from strategies.fedtrimmedavg import fedtrimmedavg
from strategies.fedyogi import fedyogi
from strategies.ifca import ifca
from strategies.krum import krum
from strategies.oort import oort
from strategies.pfedme import pfedme
from strategies.power_of_choice import power_of_choice
from strategies.qfedavg import qfedavg
from strategies.scaffold import scaffold

__all__ = [
    "afl",
    "apfl",
    "bulyan",
    "ditto",
    "fedadagrad",
    "fedadam",
    "fedasync",
    "fedavg",
    "fedavgm",
    "fedbn",
    "fedbuff",
    "feddyn",
    "fedexp",
    "fedlc",
    "fedmedian",
    "fednova",
    "fedper",
    "fedprox",
    "fedrep",
    "fedtrimmedavg",
    "fedyogi",
    "ifca",
    "krum",
    "oort",
    "pfedme",
    "power_of_choice",
    "qfedavg",
    "scaffold",
]
