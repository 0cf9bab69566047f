"""Codecs have the properties of their papers, write few bytes, and decode to the value that the client uses."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from fedlearn import (
    CompositionError,
    LocalSettings,
    Schedule,
    SettingError,
    Stage,
    Strategy,
    clip,
    federate,
    mean,
    serial,
    start,
    uniform,
)
from fedlearn.algorithm.strategy import with_compression
from fedlearn.compression import codecs
from fedlearn.compression.bit_packing import pack_indices, pack_levels, unpack_indices, unpack_levels
from fedlearn.core.layout import Layout
from fedlearn.testing import LinearTrainer, check_strategy, linear_problem

CODECS = {
    "topk": codecs.topk(share=0.1),
    "randomk": codecs.randomk(share=0.1),
    "randomk unbiased": codecs.randomk(share=0.1, error_feedback=False),
    "qsgd": codecs.qsgd(levels=4, bucket=64),
    "terngrad": codecs.terngrad(),
    "float16": codecs.half(),
    "bfloat16": codecs.half(format="bfloat16"),
    "powersgd": codecs.powersgd(rank=1),
    "eden 1": codecs.eden(),
    "eden 3": codecs.eden(bits=3),
    "signs": codecs.signs(),
}
UNBIASED = ("randomk unbiased", "qsgd", "terngrad", "eden 1", "eden 3")
LAYOUT = Layout.from_shapes([("a.weight", (20, 12)), ("a.bias", (20,)), ("b.weight", (5, 20)), ("b.bias", (5,))])
SIZE = LAYOUT.num_parameters


def round_trip(stage, vector_D, *, layout=LAYOUT, seed=0):
    """Encode a vector; return the decoded vector and the bytes."""
    payload = stage.codec.encode(vector_D, layout, np.random.default_rng(seed))
    return stage.codec.decode(payload, layout, np.random.default_rng(seed)), payload


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 300), scale=st.integers(-20, 15), zeros=st.booleans())
@pytest.mark.parametrize("name", CODECS)
def test_every_vector_can_be_written_and_read_and_stays_finite(name, seed, size, scale, zeros):
    layout = Layout.from_shapes([("w", (size,))])
    vector_D = (10.0**scale * np.random.default_rng(seed).normal(size=size) * (not zeros)).astype(np.float32)
    found_D, payload = round_trip(CODECS[name], vector_D, layout=layout, seed=seed)
    assert found_D.shape == (size,)
    assert found_D.dtype == np.float32
    assert np.isfinite(found_D).all()
    assert isinstance(payload, bytes)
    assert round_trip(CODECS[name], vector_D, layout=layout, seed=seed)[1] == payload
    if zeros and name != "signs":
        assert not found_D.any()


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=400))
@pytest.mark.parametrize("name", CODECS)
def test_bytes_of_anyone_are_read_or_refused_but_never_more(name, noise):
    try:
        found_D = CODECS[name].codec.decode(noise, LAYOUT, np.random.default_rng(0))
    except ValueError:
        return
    assert found_D.shape == (SIZE,)


@settings(max_examples=60, deadline=None)
@given(levels=st.lists(st.integers(0, 255), max_size=300), base=st.integers(2, 256))
def test_levels_are_read_as_they_were_written(levels, base):
    given_N = np.array(levels, np.int64) % base
    assert np.array_equal(unpack_levels(pack_levels(given_N, base), len(given_N), base), given_N)


@settings(max_examples=60, deadline=None)
@given(indices=st.sets(st.integers(0, 999), max_size=300))
def test_indices_are_read_as_they_were_written(indices):
    given_N = np.array(sorted(indices), np.int64)
    assert np.array_equal(unpack_indices(pack_indices(given_N, 1000), len(given_N), 1000), given_N)


def test_gaps_take_little_more_than_their_entropy():
    some = np.sort(np.random.default_rng(0).choice(1_000_000, 10_000, replace=False))
    entropy = 10_000 * (np.log2(100) + np.log2(np.e))  # bits, for 10,000 indices out of a million
    assert len(pack_indices(some, 1_000_000)) * 8 < 1.05 * entropy


def far_from_zero():
    """Return numbers of similar size, and one that is far larger.

    No number is so small that it is hardly ever drawn.
    """
    rng = np.random.default_rng(1)
    vector_D = (rng.choice([-1, 1], SIZE) * rng.uniform(0.5, 2, SIZE)).astype(np.float32)
    vector_D[7] = 12.0
    return vector_D


@pytest.mark.parametrize("name", UNBIASED)
def test_what_claims_to_be_unbiased_is(name):
    vector_D = far_from_zero()
    found_RD = np.stack([round_trip(CODECS[name], vector_D, seed=seed)[0] for seed in range(1500)]).astype(np.float64)
    deviation_D = found_RD.std(axis=0) / np.sqrt(len(found_RD))
    # the largest number is exact up to float32 rounding
    z_D = (found_RD.mean(axis=0) - vector_D) / (deviation_D + 1e-4)
    assert np.abs(z_D).max() < 5
    assert np.mean(z_D**2) < 1.3


@pytest.mark.parametrize("name", ["topk", "randomk", "powersgd", "signs", "float16"])
def test_the_test_of_unbiasedness_can_fail(name):
    vector_D = far_from_zero()
    found_RD = np.stack([round_trip(CODECS[name], vector_D, seed=seed)[0] for seed in range(300)]).astype(np.float64)
    deviation_D = found_RD.std(axis=0) / np.sqrt(len(found_RD))
    assert np.abs((found_RD.mean(axis=0) - vector_D) / np.maximum(deviation_D, 1e-12)).max() > 5


def test_bounds_of_the_papers_hold():
    rng = np.random.default_rng(2)
    layout = Layout.from_shapes([("w", (4096,))])
    vector_D = rng.standard_normal(4096).astype(np.float32)
    whole = float(vector_D @ vector_D)

    def error(stage, seed=0):
        return float(((round_trip(stage, vector_D, layout=layout, seed=seed)[0] - vector_D) ** 2).sum()) / whole

    assert error(codecs.topk(share=0.1)) <= 0.9
    assert np.mean([error(codecs.randomk(share=0.1), seed) for seed in range(20)]) == pytest.approx(0.9, rel=0.02)
    for levels in (4, 16):
        bound = min(512 / levels**2, np.sqrt(512) / levels)
        assert np.mean([error(codecs.qsgd(levels=levels, bucket=512), seed) for seed in range(5)]) <= bound
    assert np.mean([error(codecs.eden(), seed) for seed in range(5)]) == pytest.approx(np.pi / 2 - 1, rel=0.05)
    errors = [np.mean([error(codecs.eden(bits=bits), seed) for seed in range(3)]) for bits in (1, 2, 3, 4)]
    assert all(more > 2.5 * less for more, less in pairwise(errors))


@pytest.mark.framework
@settings(max_examples=200, deadline=None)
@given(number=st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32))
def test_bfloat16_rounds_as_torch_does(number):
    torch = pytest.importorskip("torch")
    vector_D, layout = np.array([number], np.float32), Layout.from_shapes([("w", (1,))])
    found_D, payload = round_trip(codecs.half(format="bfloat16"), vector_D, layout=layout)
    assert found_D[0] == float(torch.tensor(vector_D).to(torch.bfloat16)[0])
    assert len(payload) == 2


def test_a_matrix_of_low_rank_is_sent_whole():
    rng = np.random.default_rng(3)
    layout = Layout.from_shapes([("w", (40, 30))])
    matrix = (rng.normal(size=(40, 2)) @ rng.normal(size=(2, 30))).astype(np.float32)
    found_D, payload = round_trip(codecs.powersgd(rank=2), matrix.ravel(), layout=layout)
    assert np.allclose(found_D.reshape(40, 30), matrix, atol=1e-5)
    assert len(payload) == 4 * 2 * 70


def test_bytes_are_few_and_counted():
    vector_D = np.random.default_rng(4).standard_normal(100_000).astype(np.float32)
    layout = Layout.from_shapes([("w", (400, 250))])
    most = {
        "topk": 0.037, "randomk": 0.026, "qsgd": 0.10, "terngrad": 0.055, "half": 0.501, "powersgd": 0.014,
        "eden": 0.034, "signs": 0.0313,
    }  # fmt: skip
    built = {name: getattr(codecs, name)() for name in most}
    built |= {"topk": codecs.topk(share=0.025 * 0.79), "randomk": codecs.randomk(share=0.025)}
    for name, share in most.items():
        assert len(round_trip(built[name], vector_D, layout=layout)[1]) <= share * vector_D.nbytes, name


def run(strategy, *, rounds=30, learning_rate=0.05):
    trainer, data = LinearTrainer(3), linear_problem()
    engine = serial(data, trainer)
    state = start(strategy, trainer.init(1), engine, seed=1)
    local = LocalSettings(batch_size=4, learning_rate=learning_rate)
    done = list(federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local))
    return done, engine


def test_what_was_not_sent_is_remembered_and_nothing_is_lost():
    done, engine = run(with_compression(strategies.fedavg(), codecs.topk(share=0.25)), rounds=40)
    bare, _ = run(strategies.fedavg(), rounds=40)
    forgetful, _ = run(with_compression(strategies.fedavg(), codecs.topk(share=0.25, error_feedback=False)), rounds=40)
    far = [np.linalg.norm(item[-1].state.params_D - bare[-1].state.params_D) for item in (done, forgetful)]
    assert far[0] < 0.15
    assert far[0] < far[1]
    assert all(set(memory) == {"0.error"} for memory in engine.client_states.values())


def test_a_round_counts_the_bytes_that_were_written():
    done, _ = run(strategies.signsgd(), rounds=2)
    assert [item.bytes_up for item in done] == [6, 6]  # six clients, four parameters
    done, _ = run(with_compression(strategies.fedavg(), codecs.half()), rounds=1)
    assert done[0].bytes_up == 6 * 8


def test_one_client_has_one_vote_however_large_its_update():
    strategy = strategies.signsgd(learning_rate=0.5)
    from fedlearn import Context

    rows_KD = np.array([[1e9, -1e9], [-1, 1], [-2, 3]], np.float32)
    votes_KD = np.stack(
        [round_trip(strategy.stages[0], row_D, layout=Layout.from_shapes([("w", (2,))]))[0] for row_D in rows_KD]
    )
    step_D, _ = strategy.server.update(votes_KD.mean(axis=0), {}, Context(round=1, seed=1))
    assert step_D.tolist() == [-0.5, 0.5]


@pytest.mark.framework
@pytest.mark.parametrize("name", ["topk", "randomk", "qsgd", "powersgd", "eden", "half"])
def test_a_compressed_strategy_keeps_the_contract(name):
    check_strategy(with_compression(strategies.fedavg(clients_per_round=4), getattr(codecs, name)()))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((codecs.topk(), clip(1.0)), "a later stage changes them"),
        ((codecs.half(), codecs.topk()), "a later stage changes them"),
        ((clip(1.0), codecs.topk()), "lengthen an update"),
        ((clip(1.0), codecs.eden()), "lengthen an update"),
        ((Stage(needs_sum=True), codecs.topk()), "masked updates"),
    ],
)
def test_a_compression_that_breaks_what_goes_before_it_is_refused(stages, message):
    with pytest.raises(CompositionError, match=message):
        Strategy(select=uniform(3), stages=stages, aggregate=mean(weighting="equal"))


def test_a_compression_that_never_lengthens_may_follow_a_clip_and_keeps_its_bound():
    stage = codecs.topk(share=0.3, error_feedback=False)
    Strategy(select=uniform(3), stages=(clip(1.0), stage))
    for seed in range(50):
        vector_D = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)
        assert np.linalg.norm(round_trip(stage, vector_D)[0]) <= np.linalg.norm(vector_D)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: codecs.topk(share=0), "share is 0"),
        (lambda: codecs.randomk(share=1.5), "share is 1.5"),
        (lambda: codecs.qsgd(levels=200), "levels is 200"),
        (lambda: codecs.half(format="int8"), "format is int8"),
        (lambda: codecs.powersgd(rank=0), "rank is 0"),
        (lambda: codecs.eden(bits=9), "bits is 9"),
        (lambda: strategies.signsgd(learning_rate=-1), "learning_rate is -1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(build, message):
    with pytest.raises(SettingError, match=message):
        build()
