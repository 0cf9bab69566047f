"""Engines of this process. Other engines are in modules of this package, because they load a framework."""

from fedlearn.engines.base import InProcessEngine, failure, serial, vector
from fedlearn.engines.byzantine import ByzantineEngine

__all__ = [
    "ByzantineEngine",
    "InProcessEngine",
    "failure",
    "serial",
    "vector",
]
