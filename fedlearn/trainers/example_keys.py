"""Random numbers of single examples, for private steps.

In a private step, a draw (dropout, noise layers, augmentation) may depend on one example only. It must not depend on
the place of the example in a batch, or on other examples. So each example has a key, and all its draws follow from it.

Shapes: N examples of a client, M numbers per example.
"""

from __future__ import annotations

import os
from hashlib import blake2b

import numpy as np

from fedlearn.core.random import Purpose, seed_sequence
from fedlearn.core.records import ClientWork, Request
from fedlearn.trainers.batching import GOLDEN, mix_bits, round_of


def example_keys(request: Request, work: ClientWork, purpose: Purpose) -> np.ndarray:
    """Return the key of each example of a client, ``(N,)`` uint64.

    A key follows from a secret of the round and from the content of the example. In deployment the secret comes from
    the operating system. In a simulation it follows from seed, round and client. Equal examples get distinct keys: the
    first key, the second key and so on. So the keys of the other examples stay the same if one example is removed,
    added or moved.

    Args:
        request: seed, round and run mode.
        work: client and its examples.
        purpose: purpose of the draws.
    """
    if request.deployed:
        secret = os.urandom(32)
    else:
        sequence = seed_sequence(request.seed, purpose, round=round_of(request, work), client=work.client)
        secret = sequence.generate_state(4, np.uint64).tobytes()
    return content_keys(work.examples.x, work.examples.y, secret)


def content_keys(x_N: np.ndarray, y_N: np.ndarray, secret: bytes) -> np.ndarray:
    """Return keys that follow from the contents of examples and a secret, ``(N,)`` uint64. See `example_keys`.

    Args:
        x_N: inputs.
        y_N: labels.
        secret: at most 64 bytes.
    """
    x_N, y_N = np.ascontiguousarray(x_N), np.ascontiguousarray(y_N)
    digests = [
        blake2b(x.tobytes() + y.tobytes(), digest_size=8, key=secret).digest() for x, y in zip(x_N, y_N, strict=True)
    ]
    return _distinct(np.frombuffer(b"".join(digests), np.uint64).copy())


def _distinct(keys_N: np.ndarray) -> np.ndarray:
    """Return keys in which the r-th copy of a key has the number r mixed in."""
    order_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order_N]
    first_N = np.r_[True, sorted_N[1:] != sorted_N[:-1]] if len(keys_N) else np.zeros(0, bool)
    if first_N.all():
        return keys_N
    place_N = np.arange(len(keys_N))
    rank_N = place_N - np.maximum.accumulate(np.where(first_N, place_N, 0))
    distinct_N = np.empty_like(keys_N)
    distinct_N[order_N] = np.where(rank_N > 0, mix_bits(sorted_N + GOLDEN * rank_N.astype(np.uint64)), sorted_N)
    return distinct_N


def example_uniforms(keys_N: np.ndarray, count: int, *, start: int = 0) -> np.ndarray:
    """Return uniform numbers in [0, 1) from the stream of each key, ``(N, M)`` float64, multiples of 2^-53.

    Args:
        keys_N: keys of the examples.
        count: numbers per example, M.
        start: numbers of the stream to skip, >= 0.

    References:
        The generator is SplitMix64: Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014.
    """
    counter_M = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    bits_NM = mix_bits(keys_N[:, None] + GOLDEN * counter_M)
    return (bits_NM >> np.uint64(11)) * 2.0**-53
