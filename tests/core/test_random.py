from itertools import product

import numpy as np

from fedlearn.core.random import Purpose, generator, integer_seed, secret_uniforms

STREAM = [413, 965, 108, 859, 20]  # numbers of round 3, client 7, seed 1


def test_every_round_client_and_purpose_has_its_own_stream():
    keys = list(product((0, 1), (0, 1, 2), (0, 1, 2), (Purpose.BATCHES, Purpose.MODEL)))
    draws = {generator(s, p, round=r, client=c).integers(2**62) for s, r, c, p in keys}
    assert len(draws) == len(keys)
    assert len({integer_seed(s, p, round=r, client=c) for s, r, c, p in keys}) == len(keys)


def test_streams_are_the_same_on_every_machine_and_in_every_version():
    assert generator(1, Purpose.BATCHES, round=3, client=7).integers(1000, size=5).tolist() == STREAM
    assert 0 <= integer_seed(1, Purpose.MODEL, round=1, client=2) < 2**63


def test_secret_numbers_do_not_follow_from_a_generator_that_user_code_can_seed():
    draws = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002
        draws.append(secret_uniforms((4,)))
    assert not np.array_equal(*draws)
