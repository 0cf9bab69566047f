"""Provide stages that compress the update of a client: each encodes it as bytes and decodes it again."""

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
