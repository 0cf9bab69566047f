"""Shares determine a secret from the threshold on, below it they reveal nothing, and PyCryptodome reads them."""

import os

import numpy as np
import pytest

pytest.importorskip("cryptography", reason="secure aggregation needs the extra privacy")
from fedlearn.privacy.secagg.shamir import POLYNOMIAL, combine, invert, multiply, split

SECRETS = [bytes(16), b"\xff" * 16, bytes(range(16))]
SIZES = [(1, 1), (1, 3), (2, 2), (2, 3), (3, 5), (9, 17), (40, 64), (20, 300)]


@pytest.mark.parametrize(("threshold", "num_shares"), SIZES)
def test_any_shares_of_the_threshold_give_the_secret(threshold, num_shares):
    rng = np.random.default_rng(0)
    for secret, shares in zip(SECRETS, split(SECRETS, threshold=threshold, num_shares=num_shares), strict=True):
        assert len(set(shares)) == num_shares or threshold == 1
        for _ in range(3):
            chosen = rng.permutation(num_shares)[:threshold].tolist()
            assert combine({i + 1: shares[i] for i in chosen}, threshold=threshold) == secret


@pytest.mark.parametrize(("threshold", "num_shares"), [size for size in SIZES if size[0] > 1])
def test_shares_are_those_of_pycryptodome(threshold, num_shares):
    shamir = pytest.importorskip("Crypto.Protocol.SecretSharing").Shamir
    (ours,) = split(SECRETS[-1:], threshold=threshold, num_shares=num_shares)
    assert bytes(shamir.combine([*enumerate(ours, 1)][-threshold:], False)) == SECRETS[-1]
    theirs = shamir.split(threshold, num_shares, SECRETS[-1], False)
    assert combine(dict(theirs[-threshold:]), threshold=threshold) == SECRETS[-1]


def test_fewer_shares_than_the_threshold_fit_every_secret():
    """Add a share at point 0 for any other secret: the interpolation at a further point then differs."""
    (shares,) = split([SECRETS[2]], threshold=3, num_shares=5)
    others = {combine({1: shares[0], 2: shares[1], 7: os.urandom(16)}, threshold=3) for _ in range(20)}
    assert len(others) == 20


def test_equal_secrets_have_different_shares():
    first, second = split([SECRETS[0], SECRETS[0]], threshold=2, num_shares=3)
    assert not set(first) & set(second)


def test_the_product_is_that_of_the_field():
    rng = np.random.default_rng(0)

    def slow(a, b):
        product = 0
        for bit in range(128):
            product ^= a << bit if b >> bit & 1 else 0
        for bit in range(255, 127, -1):
            product ^= POLYNOMIAL << (bit - 128) if product >> bit & 1 else 0
        return product

    values = [1, 2, (1 << 128) - 1, 1 << 127, *(int.from_bytes(rng.bytes(16), "big") for _ in range(20))]
    for a in values:
        assert multiply(a, invert(a)) == 1
        for b in values:
            assert multiply(a, b) == multiply(b, a) == slow(a, b)
