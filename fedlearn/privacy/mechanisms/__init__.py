"""One file for each way of keeping a promise; `fedlearn.privacy.mechanism` says what they share."""

from fedlearn.privacy.mechanism import none
from fedlearn.privacy.mechanisms.central import central
from fedlearn.privacy.mechanisms.example import example
from fedlearn.privacy.mechanisms.ftrl import ftrl
from fedlearn.privacy.mechanisms.local import local
from fedlearn.privacy.mechanisms.masked import distributed, secagg

__all__ = ["central", "distributed", "example", "ftrl", "local", "none", "secagg"]
