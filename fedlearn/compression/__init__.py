"""Compression of updates: stages that encode the update of a client as bytes."""

from fedlearn.compression.codecs import eden, half, powersgd, qsgd, randomk, signs, terngrad, topk

__all__ = [
    "eden",
    "half",
    "powersgd",
    "qsgd",
    "randomk",
    "signs",
    "terngrad",
    "topk",
]
