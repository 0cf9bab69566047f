"""Engines of this process. Other engines are in modules of this package, because they load a framework."""

from fedlearn.engines.base import InProcessEngine, serial, vector

__all__ = [
    "InProcessEngine",
    "serial",
    "vector",
]
