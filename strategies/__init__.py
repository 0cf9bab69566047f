"""Strategies of federated learning, one file per paper. They use only public names of fedlearn."""

from strategies.afl import afl
from strategies.apfl import apfl
from strategies.bucketing import bucketing
from strategies.bulyan import bulyan
from strategies.centered_clipping import centered_clipping
from strategies.diloco import diloco
from strategies.ditto import ditto
from strategies.fcf import fcf
from strategies.fedadagrad import fedadagrad
from strategies.fedadam import fedadam
from strategies.fedala import fedala
from strategies.fedamp import fedamp
from strategies.fedasync import fedasync
from strategies.fedavg import fedavg
from strategies.fedavgm import fedavgm
from strategies.fedbn import fedbn
from strategies.fedbuff import fedbuff
from strategies.fedcm import fedcm
from strategies.feddecorr import feddecorr
from strategies.feddyn import feddyn
from strategies.fedexp import fedexp
from strategies.fedgkd import fedgkd
from strategies.fedit import fedit
from strategies.fedlc import fedlc
from strategies.fedmedian import fedmedian
from strategies.fednova import fednova
from strategies.fedntd import fedntd
from strategies.fedper import fedper
from strategies.fedprox import fedprox
from strategies.fedrep import fedrep
from strategies.fedsa_lora import fedsa_lora
from strategies.fedsam import fedsam
from strategies.fedspeed import fedspeed
from strategies.fedtrimmedavg import fedtrimmedavg
from strategies.fedyogi import fedyogi
from strategies.ffa_lora import ffa_lora
from strategies.flora import flora
from strategies.fltrust import fltrust
from strategies.ifca import ifca
from strategies.krum import krum
from strategies.moon import moon
from strategies.nnm import nnm
from strategies.norm_bounding import norm_bounding
from strategies.oort import oort
from strategies.pfedme import pfedme
from strategies.power_of_choice import power_of_choice
from strategies.proxskip import proxskip
from strategies.qfedavg import qfedavg
from strategies.rfa import rfa
from strategies.scaffold import scaffold
from strategies.signsgd import signsgd

__all__ = [
    "afl",
    "apfl",
    "bucketing",
    "bulyan",
    "centered_clipping",
    "diloco",
    "ditto",
    "fcf",
    "fedadagrad",
    "fedadam",
    "fedala",
    "fedamp",
    "fedasync",
    "fedavg",
    "fedavgm",
    "fedbn",
    "fedbuff",
    "fedcm",
    "feddecorr",
    "feddyn",
    "fedexp",
    "fedgkd",
    "fedit",
    "fedlc",
    "fedmedian",
    "fednova",
    "fedntd",
    "fedper",
    "fedprox",
    "fedrep",
    "fedsa_lora",
    "fedsam",
    "fedspeed",
    "fedtrimmedavg",
    "fedyogi",
    "ffa_lora",
    "flora",
    "fltrust",
    "ifca",
    "krum",
    "moon",
    "nnm",
    "norm_bounding",
    "oort",
    "pfedme",
    "power_of_choice",
    "proxskip",
    "qfedavg",
    "rfa",
    "scaffold",
    "signsgd",
]
