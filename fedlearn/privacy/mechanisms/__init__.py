"""Privacy mechanisms, one file each; `fedlearn.privacy.mechanisms.base` holds their shared parts."""

from fedlearn.privacy.mechanisms.base import none
from fedlearn.privacy.mechanisms.central_dp import central
from fedlearn.privacy.mechanisms.dp_ftrl import ftrl
from fedlearn.privacy.mechanisms.dp_sgd import example
from fedlearn.privacy.mechanisms.local_dp import local
from fedlearn.privacy.mechanisms.secure_aggregation import distributed, secagg

__all__ = ["central", "distributed", "example", "ftrl", "local", "none", "secagg"]
