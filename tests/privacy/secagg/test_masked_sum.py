import inspect
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import strategies
from fedlearn import (
    CompositionError,
    Context,
    Layout,
    LocalRule,
    LocalSettings,
    Schedule,
    SettingError,
    Strategy,
    Updates,
    everyone,
    federate,
    mean,
    serial,
    stacked,
    start,
    uniform,
    vector,
)
from fedlearn.testing import LinearTrainer, linear_problem

pytest.importorskip("cryptography", reason="masking needs the extra privacy")
pytest.importorskip("Crypto", reason="masking needs the extra privacy")
from fedlearn.privacy.mechanisms import secure_aggregation as mechanisms
from fedlearn.privacy.secagg import masked_sum
from fedlearn.privacy.secagg.errors import SecAggAborted
from fedlearn.privacy.secagg.fixed_point import FixedPoint
from fedlearn.privacy.secagg.masked_sum import Masking, integer_mean

noisy = partial(Masking, noise="skellam", bits=14)
ROOT = Path(masked_sum.__file__).parents[3]
LAYOUT = Layout.from_shapes([("w", (5,))])
LOCAL = LocalSettings(batch_size=4, learning_rate=0.05)


def equal():
    return strategies.fedavg(weighting="equal")


class Unreliable(LinearTrainer):
    """A trainer with some clients that always fail."""

    def __init__(self, num_features, failing=()):
        super().__init__(num_features)
        self.failing = failing

    def fit(self, order, rule, work):
        if any(item.client in self.failing for item in work):
            raise RuntimeError("this client fails")
        return super().fit(order, rule, work)


def trained(protection, *, engine=serial, failing=(), rounds=4, state=None, num_clients=6):
    strategy = protection.protect(equal(), num_clients=num_clients) if protection else equal()
    trainer = Unreliable(3, failing)
    started = engine(linear_problem(num_clients=num_clients), trainer)
    state = state or start(strategy, trainer.init(1), started, seed=1)
    schedule = Schedule(rounds=rounds, max_failures=0.9)
    for done in federate(strategy, started, state, schedule=schedule, local=LOCAL):
        state = done.state
    return state


def blocks_of(size):
    return lambda data, trainer: vector(data, trainer, block_size=size)


KINDS = {
    "secagg": Masking(clip_norm=10.0),
    "skellam": noisy(clip_norm=1.0, noise_multiplier=0.1),
    "discrete_gaussian": noisy(clip_norm=1.0, noise_multiplier=0.1, noise="discrete_gaussian"),
}


@pytest.mark.parametrize("protection", KINDS.values(), ids=KINDS)
def test_the_real_protocol_and_the_sum_give_the_same_model_bit_for_bit(protection):
    for failing in [(), (0, 4)]:
        summed = trained(protection, failing=failing)
        full = trained(replace(protection, protocol="full"), failing=failing)
        assert np.array_equal(summed.params_D, full.params_D)


@pytest.mark.parametrize("protection", KINDS.values(), ids=KINDS)
def test_the_model_does_not_depend_on_engine_or_blocks(protection):
    alone = trained(protection).params_D
    for size in (1, 4, 6):
        assert np.array_equal(alone, trained(protection, engine=blocks_of(size)).params_D)


def test_masked_means_are_plain_means_up_to_rounding():
    masked, plain = trained(Masking(clip_norm=10.0, bits=28)).params_D, trained(None).params_D
    assert np.allclose(masked, plain, atol=1e-6)
    assert not np.allclose(masked, trained(Masking(clip_norm=10.0, bits=6)).params_D, atol=1e-6)


def test_a_round_below_the_threshold_gives_nothing_and_the_next_one_works():
    state = trained(KINDS["secagg"], rounds=1)
    with pytest.raises(SecAggAborted, match="3 clients responded, expected 4 to 6"):
        trained(KINDS["secagg"], rounds=2, state=state, failing=(0, 1, 2))
    assert np.array_equal(
        trained(KINDS["secagg"], rounds=2, state=state).params_D, trained(KINDS["secagg"], rounds=2).params_D
    )


@pytest.mark.framework
def test_updates_from_torch_and_jax_are_masked_as_numpy_ones_are():
    encode = Masking(clip_norm=1.0, cohort=3).protect(equal()).stages[-1].client.update
    delta_KD = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    context = Context(round=1, seed=1, clients_K=np.arange(3))
    expected, _ = encode(delta_KD, {}, context)
    assert expected.dtype == np.uint32
    for library, make in (("torch", "from_numpy"), ("jax.numpy", "asarray")):
        module = pytest.importorskip(library)
        assert np.array_equal(encode(getattr(module, make)(delta_KD), {}, context)[0], expected)


rows = st.integers(1, 8).flatmap(
    lambda k: st.lists(st.lists(st.integers(-(2**15) + 1, 2**15 - 1), min_size=5, max_size=5), min_size=k, max_size=k)
)


@given(rows, st.data())
def test_integer_means_are_exact_whatever_the_order_the_blocks_and_the_merging(integers, data):
    code = FixedPoint(bound=1.0, bits=16, max_clients=8)
    rows_KD = code.wrap(np.array(integers))
    k = len(rows_KD)
    aggregate = integer_mean(code, threshold=1, denominator=1)
    order = data.draw(st.permutations(range(k)))
    cut = data.draw(st.integers(0, k))
    folds = []
    for part in (order[:cut], order[cut:]):
        fold = aggregate.init(LAYOUT)
        for client in part:
            ones = np.ones(1, int)
            item = Updates(clients_K=ones * client, delta_KD=rows_KD[[client]], num_examples_K=ones, num_steps_K=ones)
            fold = aggregate.add(fold, item)
        folds.append(fold)
    total_D = aggregate.finalize(aggregate.merge(*folds))
    assert np.array_equal(total_D, (np.sum(integers, axis=0) / code.scale).astype(np.float32))


# noise


def noise_in_the_sum(protection, *, size, delivered, length=100_000):
    """Return the noise in a sum of ``delivered`` clients of a cohort of ``size``, in units of the update."""
    strategy = protection.protect(equal(), num_clients=size)
    (stage,), aggregate = strategy.stages, strategy.aggregate
    context = Context(round=1, seed=3, clients_K=np.arange(delivered))
    rng = np.random.default_rng(0)
    delta_KD = rng.normal(size=(delivered, length)).astype(np.float32)
    delta_KD /= np.linalg.norm(delta_KD, axis=1, keepdims=True)
    sent_KD, _ = stage.client.update(delta_KD, {}, context)
    ones = np.ones(delivered, int)
    updates = Updates(clients_K=np.arange(delivered), delta_KD=sent_KD, num_examples_K=ones, num_steps_K=ones)
    layout = Layout.from_shapes([("w", (length,))])
    mean_D, _ = stage.server.update(
        aggregate.finalize(aggregate.add(aggregate.init(layout), updates)), stage.server.init(layout), context
    )
    return mean_D.astype(np.float64) * size - delta_KD.astype(np.float64).sum(axis=0)


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("flatten", [1.0, 8.0])
def test_noise_after_dropouts_down_to_the_threshold_is_what_was_promised_within_2_percent(noise, flatten):
    bits = 14 if flatten == 1 else 11
    for z, delivered in [(0.8, 6), (0.8, 10), (3.0, 6)]:
        protection = noisy(clip_norm=1.0, noise_multiplier=z, noise=noise, flatten=flatten, bits=bits)
        rest_D = noise_in_the_sum(protection, size=10, delivered=delivered)
        promised = z * masked_sum.ROUNDING_SLACK * np.sqrt(delivered / 6)
        assert rest_D.std() == pytest.approx(promised, rel=0.02)
        assert abs(rest_D.mean()) < 5 * promised / np.sqrt(len(rest_D))


def test_too_little_noise_would_be_noticed():
    protection = replace(KINDS["skellam"], noise_multiplier=0.8 / 5)
    assert noise_in_the_sum(protection, size=10, delivered=6).std() != pytest.approx(
        0.8 * masked_sum.ROUNDING_SLACK, rel=0.5
    )


def epsilon(release, *, rounds):
    """Return epsilon of a number of releases at delta 1e-5."""
    pytest.importorskip("dp_accounting", reason="epsilon needs the extra privacy")
    from dp_accounting.rdp import compute_epsilon, rdp_privacy_accountant

    orders = np.array(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
    return compute_epsilon(orders, rounds * release.rdp(orders), 1e-5)[0]


def test_the_cost_of_a_round_is_that_of_a_gaussian_with_the_noise_of_the_smallest_sum():
    for noise, worst in (("skellam", 1.01), ("discrete_gaussian", 1.0001)):
        release = noisy(clip_norm=0.3, noise_multiplier=1.0, noise=noise).noisy_sum(100)
        assert (release.min_clients, release.max_clients) == (51, 100)
        assert release.noise_multiplier == pytest.approx(1.0)
        gaussian = 4.728507  # epsilon of one Gaussian release at noise multiplier 1, delta 1e-5, by Renyi divergences
        assert gaussian - 1e-5 <= epsilon(release, rounds=1) <= worst * gaussian
        assert epsilon(release, rounds=100) > 10 * gaussian


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    st.booleans(),
    st.sampled_from([1.0, 2.0]),
)
def test_no_update_however_large_moves_the_sum_by_more_than_the_bound(seed, size, sparse, flatten):
    protection = noisy(clip_norm=0.5, noise_multiplier=1.0, cohort=4, bits=12, flatten=flatten)
    (stage,) = protection.protect(equal()).stages
    rng = np.random.default_rng(seed)
    delta_KD = (rng.normal(size=(2, 60)) * size).astype(np.float32)
    if sparse:
        delta_KD[:, 1:] = 0
    context = Context(round=1, seed=seed, clients_K=np.arange(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_sum, "draw_noise", lambda kind, std, size, stream: 0)
        sent_KD, _ = stage.client.update(delta_KD, {}, context)
    norms_K = np.linalg.norm(sent_KD.view(np.int32).astype(np.float64), axis=1)
    assert np.all(norms_K <= protection.noisy_sum(4).norm)


def test_noise_of_real_clients_does_not_follow_from_the_seed():
    (stage,) = KINDS["skellam"].protect(equal(), num_clients=6).stages
    delta_KD = np.zeros((2, 200), np.float32)

    def sent(**how):
        return stage.client.update(delta_KD, {}, Context(clients_K=np.arange(2), **how))[0]

    assert np.array_equal(sent(round=1, seed=1), sent(round=1, seed=1))
    for other in (sent(round=2, seed=1), sent(round=1, seed=2), sent(round=1, seed=1)[::-1]):
        assert not np.array_equal(sent(round=1, seed=1), other)
    assert not np.array_equal(sent(round=1, seed=1, deployed=True), sent(round=1, seed=1, deployed=True))
    assert not np.array_equal(sent(round=1, seed=1, deployed=True), sent(round=1, seed=1))


def test_not_a_number_is_not_encoded():
    for protection in KINDS.values():
        (stage,) = protection.protect(equal(), num_clients=6).stages
        for bad in (np.nan, np.inf):
            with pytest.raises(ValueError, match="NaN or infinity"):
                stage.client.update(np.full((1, 5), bad), {}, Context(round=1, seed=1, clients_K=np.arange(1)))


# refused combinations


def test_sums_that_could_wrap_around_are_refused_when_the_strategy_is_built():
    with pytest.raises(SettingError, match=r"must stay below 2\*\*31") as refused:
        Masking(clip_norm=1.0, bits=26, cohort=100)
    assert refused.value.fix == "bits=25"
    Masking(clip_norm=1.0, bits=25, cohort=100)
    with pytest.raises(SettingError, match=r"must stay below 2\*\*31"):
        Masking(clip_norm=1.0, bits=28).protect(strategies.fedavg(weighting="equal", clients_per_round=100))
    with pytest.raises(SettingError, match=r"must stay below 2\*\*15"):
        noisy(clip_norm=1.0, noise_multiplier=1.0, bits=12, modulus_bits=16, cohort=10).protect(equal())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Masking(clip_norm=float("nan")), "clip_norm is nan"),
        (lambda: Masking(clip_norm=0), "clip_norm is 0"),
        (lambda: Masking(clip_norm=1.0, bits=1), "bits is 1"),
        (lambda: Masking(clip_norm=1.0, modulus_bits=31), "modulus_bits is 31"),
        (lambda: Masking(clip_norm=1.0, cohort=1), "cohort is 1"),
        (lambda: Masking(clip_norm=1.0, cohort=10, threshold=5), "threshold is 5"),
        (lambda: Masking(clip_norm=1.0, cohort=10, threshold=0), "threshold is 0"),
        (lambda: Masking(clip_norm=1.0, cohort=10, threshold=11), "threshold is 11"),
        (lambda: Masking(clip_norm=1.0, protocol="half"), "protocol is half"),
        (lambda: noisy(clip_norm=1.0, noise_multiplier=float("nan")), "noise_multiplier is nan"),
        (lambda: noisy(clip_norm=1.0, noise_multiplier=0.0), "noise_multiplier is 0"),
        (lambda: noisy(clip_norm=1.0, noise_multiplier=1.0, noise="laplace"), "noise is laplace"),
        (lambda: noisy(clip_norm=1.0, noise_multiplier=1.0, flatten=0.5), "flatten is 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(SettingError, match=message):
        build()


@pytest.mark.parametrize(("noise_multiplier", "bits", "fix"), [(1.0, 3, 5), (9.0, 20, 14)])
def test_noise_below_one_integer_or_too_large_to_be_drawn_is_refused_with_bits_that_work(noise_multiplier, bits, fix):
    with pytest.raises(SettingError, match="between 1 and 16384") as refused:
        noisy(clip_norm=1.0, noise_multiplier=noise_multiplier, bits=bits, cohort=100).protect(equal())
    assert refused.value.fix == f"bits={fix}"
    noisy(clip_norm=1.0, noise_multiplier=noise_multiplier, bits=fix, cohort=100).protect(equal())


def test_an_unknown_number_of_clients_is_refused():
    with pytest.raises(SettingError, match="cohort is None"):
        Masking(clip_norm=1.0).protect(Strategy(select=everyone(), aggregate=mean(weighting="equal")))


@pytest.mark.parametrize("aggregate", [mean(), stacked(lambda updates, state, context: (updates.delta_KD[0], state))])
def test_what_is_not_an_equally_weighted_sum_cannot_be_masked(aggregate):
    with pytest.raises(CompositionError, match="equally weighted"):
        Masking(clip_norm=1.0).protect(Strategy(select=uniform(5), aggregate=aggregate))


def test_vectors_that_would_leave_beside_the_masked_one_are_refused():
    rule = LocalRule(client_state=("c",), after_training=lambda delta, steps, rate, c: ({"c": c}, {"c_change": delta}))
    with pytest.raises(CompositionError, match="c_change"):
        Masking(clip_norm=1.0).protect(Strategy(select=uniform(5), local=rule, aggregate=mean(weighting="equal")))


def test_a_model_too_large_for_its_bits_is_refused_before_the_first_round():
    strategy = noisy(clip_norm=1.0, noise_multiplier=1.0, bits=10, cohort=4).protect(equal())
    with pytest.raises(SettingError, match=r"privacy\.bits is 10"):
        strategy.stages[-1].server.init(Layout.from_shapes([("w", (100_000,))]))
    strategy = noisy(clip_norm=1.0, noise_multiplier=1.0, cohort=4, flatten=50.0, bits=10).protect(equal())
    with pytest.raises(SettingError, match=r"privacy\.flatten is 50"):
        strategy.stages[-1].server.init(Layout.from_shapes([("w", (1000,))]))


def test_more_clients_than_sums_were_made_for_are_not_added_up():
    with pytest.raises(SecAggAborted, match="6 clients responded, expected 3 to 4"):
        trained(Masking(clip_norm=1.0, cohort=4))


# settings and imports


@pytest.mark.parametrize("builder", [mechanisms.secagg, mechanisms.distributed], ids=lambda builder: builder.__name__)
def test_the_configuration_has_the_settings_of_the_builder(builder):
    given = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/privacy/{builder.__name__}.yaml"))
    assert set(inspect.signature(builder).parameters) <= set(given)


@pytest.mark.process
def test_importing_fedlearn_loads_no_cryptography():
    heavy = ("cryptography", "Crypto", "dp_accounting", "scipy")
    modules = "fedlearn, strategies, fedlearn.privacy.secagg.masked_sum, sys"
    code = f"import {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("num_parties", "threshold"), [(None, 4), (3, 3), (4, 3), (6, 4), (9, 4)])
def test_noise_is_sized_for_the_smallest_sum_with_one_client_per_party(num_parties, threshold):
    masking = replace(KINDS["skellam"], noise_multiplier=1.5, num_parties=num_parties)
    smallest = masking.noisy_sum(6)
    assert masking.threshold_of(6) == smallest.min_clients == threshold
    assert smallest.std * np.sqrt(threshold) == pytest.approx(1.5 * masking.norm)
    assert smallest.equivalent_noise_multiplier == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(("size", "threshold"), [(2, 2), (3, 3), (4, 3), (5, 4), (9, 6), (100, 51)])
def test_the_default_threshold_resists_one_colluding_party(size, threshold):
    assert Masking(clip_norm=1.0).threshold_of(size) == threshold
    assert 2 * threshold > size + 1
