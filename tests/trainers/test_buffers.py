"""Batch norm statistics: refused, averaged or kept at the clients, with equal results in both frameworks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import strategies
from fedlearn import (
    Examples,
    FederatedData,
    FedlearnError,
    LocalRule,
    LocalSettings,
    Scenario,
    Schedule,
    SettingError,
    Stage,
    Strategy,
    Transform,
    everyone,
    federate,
    judge,
    mean,
    proximal,
    serial,
    sgd,
    stacked,
    start,
    vector,
)
from fedlearn.algorithm import plain_training, with_buffer_policy
from fedlearn.core import ClientWork, Request, checkpoint
from fedlearn.core.layout import default_initial_parameters
from fedlearn.core.records import ExampleDP
from fedlearn.privacy.mechanisms import central, secagg
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import check_twins
from fedlearn.trainers.batching import batch_plans
from fedlearn.trainers.mixed import MixedTrainer

torch = pytest.importorskip("torch")
linen = pytest.importorskip("flax.linen")
JaxTrainer = pytest.importorskip("fedlearn.trainers.jax").JaxTrainer
TorchTrainer = pytest.importorskip("fedlearn.trainers.torch").TorchTrainer

nn = torch.nn
SIZES, FEATURES, EPSILON = (6, 11, 12, 7), 3, 1e-5
LOCAL = LocalSettings(epochs=2, batch_size=4, learning_rate=0.05, momentum=0.5, weight_decay=0.1)
STATISTICS = ("norm.running_mean", "norm.running_var")


class TorchNet(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(FEATURES, momentum=momentum), nn.Linear(FEATURES, 1)

    def forward(self, x):
        return self.out(self.norm(x))


class FlaxNet(linen.Module):
    @linen.compact
    def __call__(self, x, *, train=False):
        norm = linen.BatchNorm(not train, momentum=0.9, use_fast_variance=False, name="norm")
        return linen.Dense(1, name="out")(norm(x))


def in_torch():
    return TorchTrainer(TorchNet(), task="regression", initial=default_initial_parameters)


def in_jax():
    return JaxTrainer(FlaxNet(), task="regression", input_shape=(FEATURES,))


TORCH, JAX = in_torch(), in_jax()
LAYOUT = TORCH.layout


@pytest.fixture(scope="module")
def examples():
    """Return clients whose features have different means and scales."""
    rng = np.random.default_rng(0)
    built = []
    for k, size in enumerate(SIZES):
        x = (rng.normal(size=(size, FEATURES)) * (1 + k) + 3 * k).astype(np.float32)
        built.append(Examples(x, ((x - 3 * k) / (1 + k) @ [1.0, -2.0, 0.5]).astype(np.float32)))
    return built


@pytest.fixture(scope="module")
def data(examples):
    return FederatedData(
        task="regression", clients=range(len(SIZES)), train=examples.__getitem__, test=examples.__getitem__
    )


def averaging(strategy=None):
    return with_buffer_policy(strategy or strategies.fedavg(), LAYOUT, "average")


def run(strategy, data, trainer=TORCH, *, rounds=3, engine=serial, state=None, memories=None, local=None):
    built = engine(data, trainer)
    built.client_states.update(memories or {})
    state = state or start(strategy, trainer.init(1), built, seed=1)
    evaluate = judge(Scenario(name="normed", data=data, trainer=trainer, model="norm"))
    plan = Schedule(rounds=rounds)
    return list(federate(strategy, built, state, schedule=plan, local=local or LOCAL, evaluate=evaluate)), built


def order(**changes):
    return Request(round=1, seed=1, params_D=TORCH.init(1), local=replace(LOCAL, **changes))


def named(params_D):
    return LAYOUT.unpack(np.asarray(params_D))


def test_a_model_with_buffers_is_refused_by_their_names_with_the_two_other_policies(data):
    with pytest.raises(SettingError, match=r"average or local(.|\n)*norm.running_mean, norm.running_var") as caught:
        run(strategies.fedavg(), data)
    assert caught.value.setting == "buffers"
    with pytest.raises(SettingError, match="buffers is mean"):
        with_buffer_policy(strategies.fedavg(), LAYOUT, "mean")
    # there are no buffers to refuse
    assert with_buffer_policy(strategies.fedavg(), LAYOUT.trainable, "refuse").buffers == "refuse"


def test_buffers_lie_in_the_vector_of_both_frameworks_as_a_model_begins_with_them(examples):
    assert JAX.layout == LAYOUT
    assert LAYOUT.buffers == STATISTICS
    first = named(TORCH.init(1))
    assert first["norm.running_mean"].tolist() == [0.0] * FEATURES
    assert first["norm.running_var"].tolist() == [1.0] * FEATURES
    check_twins(TORCH, JAX, examples, tolerance=1e-5)


def transcribed(examples, client, began, *, mu):
    """Train in float64: batch norm, an affine map, squared error, and SGD with all its options."""
    g, b, w, c = (began[name] for name in ("norm.weight", "norm.bias", "out.weight", "out.bias"))
    weights = first = {"g": g, "b": b, "w": w[0], "c": c}
    velocity = dict.fromkeys(weights, 0.0)
    mean_F, var_F = began["norm.running_mean"], began["norm.running_var"]
    plan_KSB, _ = batch_plans(order(), np.array([client]), np.array([len(examples)]))
    for rows in plan_KSB[0]:
        batch = rows[rows >= 0]
        x, y = examples.x[batch].astype(np.float64), examples.y[batch].astype(np.float64)
        m, v = x.mean(0), x.var(0)
        unit = (x - m) / np.sqrt(v + EPSILON)
        z = unit * weights["g"] + weights["b"]
        error = 2 * (z @ weights["w"] + weights["c"] - y) / len(y)
        back = error[:, None] * weights["w"]
        gradient = {"g": (back * unit).sum(0), "b": back.sum(0), "w": error @ z, "c": error.sum(keepdims=True)}
        for name, value in gradient.items():
            pull = value + mu * (weights[name] - first[name]) + LOCAL.weight_decay * weights[name]
            velocity[name] = LOCAL.momentum * velocity[name] + pull
        weights = {name: value - LOCAL.learning_rate * velocity[name] for name, value in weights.items()}
        mean_F = 0.9 * mean_F + 0.1 * m
        var_F = 0.9 * var_F + 0.1 * v * len(y) / (len(y) - 1)
    ends = {"norm.weight": weights["g"], "norm.bias": weights["b"], "out.weight": weights["w"][None]}
    return {**ends, "out.bias": weights["c"], "norm.running_mean": mean_F, "norm.running_var": var_F}


@pytest.mark.parametrize("trainer", [TORCH, JAX], ids=["torch", "jax"])
def test_a_round_of_averaging_is_its_float64_transcription(data, examples, trainer):
    mu, rate = 0.3, 0.5
    strategy = averaging(Strategy(select=everyone(), local=proximal(mu), aggregate=mean(), server=sgd(rate)))
    (done,), _ = run(strategy, data, trainer, rounds=1)
    first = {name: value.astype(np.float64) for name, value in named(TORCH.init(1)).items()}
    ends = [transcribed(examples[client], client, first, mu=mu) for client in range(len(SIZES))]
    found = named(done.state.params_D)
    for name, began in first.items():
        moved = sum(n * (end[name] - began) for n, end in zip(SIZES, ends, strict=True)) / sum(SIZES)
        step = moved if name in STATISTICS else rate * moved  # the server's learning rate does not apply to statistics
        np.testing.assert_allclose(found[name], began + step, rtol=0, atol=2e-6)


def test_averaged_runs_are_equal_in_torch_jax_and_both_mixed_and_in_every_engine(data):
    runs = [run(averaging(), data, trainer)[0] for trainer in (TORCH, JAX, MixedTrainer([TORCH, JAX]))]
    ends = [np.asarray(rounds[-1].state.params_D) for rounds in runs]
    assert np.abs(ends[0] - ends[1]).max() < 1e-5
    assert np.abs(ends[0] - ends[2]).max() < 1e-5
    rounds, _ = run(averaging(), data, engine=vector)
    assert np.array_equal(ends[0], rounds[-1].state.params_D)


def test_jax_takes_the_same_statistics_with_clients_side_by_side(examples):
    work = [ClientWork(client=k, examples=item) for k, item in enumerate(examples)]
    rows = [np.asarray(JAX.with_batching(how).fit(order(), plain_training, work).delta_KD) for how in ("map", "vmap")]
    np.testing.assert_allclose(*rows, rtol=0, atol=1e-6)


def test_a_model_is_judged_by_the_averaged_statistics(data, examples):
    rounds, _ = run(averaging(), data)
    params_D = np.array(rounds[-1].state.params_D)
    blind_D = params_D.copy()
    blind_D[LAYOUT.positions(STATISTICS)] = TORCH.init(1)[LAYOUT.positions(STATISTICS)]
    x = examples[2].x
    assert np.abs(TORCH.predict(params_D, x) - TORCH.predict(blind_D, x)).max() > 0.1
    np.testing.assert_allclose(TORCH.predict(params_D, x), JAX.predict(params_D, x), atol=1e-5)
    module = TORCH.network(params_D)
    plain_module = TorchNet()
    plain_module.load_state_dict(module.state_dict())
    assert int(plain_module.norm.num_batches_tracked) == 0
    with torch.inference_mode():
        assert np.array_equal(plain_module.eval()(torch.from_numpy(x)).numpy(), TORCH.predict(params_D, x))
    assert module.norm.running_var.untyped_storage().nbytes() == 4 * FEATURES  # not a view of the whole model


@pytest.mark.parametrize("trainer", [TORCH, JAX], ids=["torch", "jax"])
def test_local_statistics_never_leave_and_each_client_is_judged_by_its_own(data, trainer):
    strategy = with_buffer_policy(strategies.fedavg(), LAYOUT, "local")
    rounds, engine = run(strategy, data, trainer)
    assert strategy.shared_layout(LAYOUT) == LAYOUT.trainable
    assert rounds[0].bytes_up == len(SIZES) * 4 * LAYOUT.trainable.num_parameters
    first, last = named(TORCH.init(1)), named(rounds[-1].state.params_D)
    assert all(np.array_equal(first[name], last[name]) for name in STATISTICS)  # the server's values are unchanged
    current = [engine.client_states[client]["local.kept"][:FEATURES].mean() for client in data.clients]
    assert np.all(np.diff(current) > 0.5)  # in the order of the clients' features
    seen = rounds[-1].evaluation
    alone = [trainer.predict(rounds[-1].state.params_D, data.test(k).x)[:, 0] - data.test(k).y for k in data.clients]
    assert seen.pooled["rmse"] < np.sqrt(np.mean(np.concatenate(alone) ** 2))


@pytest.mark.parametrize("policy", ["average", "local"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(data, tmp_path, policy):
    strategy = with_buffer_policy(strategies.fedavgm(clients_per_round=3), LAYOUT, policy)
    rounds, engine = run(strategy, data, rounds=2)
    checkpoint.save(tmp_path, rounds[-1].state, engine.client_states, layout=LAYOUT)
    state, memories, _ = checkpoint.load_latest(tmp_path, LAYOUT)
    resumed, there = run(strategy, data, in_torch(), rounds=4, state=state, memories=memories)
    whole, here = run(strategy, data, rounds=4)
    assert np.array_equal(resumed[-1].state.params_D, whole[-1].state.params_D)
    assert there.client_states.keys() == here.client_states.keys()
    for client, memory in here.client_states.items():
        assert all(np.array_equal(there.client_states[client][name], kept) for name, kept in memory.items())


def test_server_optimisers_leave_statistics_to_the_mean(data):
    (item,), _ = run(averaging(strategies.fedadam(learning_rate=1.0)), data, rounds=1)
    (other,), _ = run(averaging(strategies.fedavg()), data, rounds=1)
    at = LAYOUT.positions(STATISTICS)
    assert np.array_equal(item.state.params_D[at], other.state.params_D[at])
    assert not np.allclose(item.state.params_D, other.state.params_D)


def test_a_rule_on_all_updates_moves_statistics_too(data):
    still = stacked(lambda updates, state, context: (0 * updates.delta_KD[0], state))
    (item,), _ = run(averaging(Strategy(select=everyone(), aggregate=still)), data, rounds=1)
    assert np.array_equal(item.state.params_D, TORCH.init(1))


def test_fedbn_keeps_the_statistics_with_the_norms(data):
    strategy = averaging(strategies.fedbn())
    assert [leaf.name for leaf in strategy.shared_layout(LAYOUT).leaves] == ["out.bias", "out.weight"]
    rounds, engine = run(strategy, data)
    assert len({float(memory["local.kept"].sum()) for memory in engine.client_states.values()}) == len(SIZES)
    assert rounds[-1].evaluation.pooled["rmse"] < rounds[0].evaluation.pooled["rmse"]


def test_statistics_move_in_both_parts_of_a_training_in_parts(data, examples):
    rule = LocalRule(personal_parameters=("out.*",), personal_epochs=1)
    strategy = averaging(Strategy(select=everyone(), local=rule))
    (alone,), _ = run(strategy, replace(data, clients=[2]), rounds=1)
    expected = np.zeros(FEATURES)
    for epochs in (1, LOCAL.epochs):  # first the personal part, then the shared part
        plan_KSB, _ = batch_plans(order(epochs=epochs), np.array([2]), np.array([SIZES[2]]))
        for rows in plan_KSB[0]:
            expected = 0.9 * expected + 0.1 * examples[2].x[rows[rows >= 0]].mean(0)
    np.testing.assert_allclose(named(alone.state.params_D)["norm.running_mean"], expected, atol=1e-5)


def test_integer_buffers_are_as_given_whenever_a_client_begins(examples):
    built = TorchTrainer(TorchNet(momentum=None), task="regression")
    work = [ClientWork(client=k, examples=item) for k, item in enumerate(examples)]
    block = built.fit(order(epochs=1), plain_training, work).delta_KD
    alone = [built.fit(order(epochs=1), plain_training, [item]).delta_KD[0] for item in work]
    assert np.array_equal(block, np.stack(alone))
    plan_KSB, _ = batch_plans(order(epochs=1), np.array([1]), np.array([SIZES[1]]))
    means = [examples[1].x[rows[rows >= 0]].mean(0) for rows in plan_KSB[0]]
    found = named(built.init(1) + block[1])["norm.running_mean"]
    np.testing.assert_allclose(found, np.mean(means, axis=0), atol=1e-5)


@pytest.mark.parametrize("trainer", [TORCH, JAX], ids=["torch", "jax"])
def test_example_level_privacy_is_refused_whatever_the_policy(examples, trainer):
    private = order(example_dp=ExampleDP(clip=1.0))
    with pytest.raises(SettingError, match="mix the examples of a batch"):
        trainer.fit(private, plain_training, [ClientWork(client=0, examples=examples[0])])


def test_noise_on_updates_is_refused_where_statistics_are_in_them_and_fine_where_they_stay():
    fedavg = strategies.fedavg(weighting="equal", clients_per_round=2)
    population = Population(clients=range(4), rounds=3)
    noised, _ = central(clip_norm=1.0, noise_multiplier=1.0).protect(fedavg, LOCAL, population)
    with pytest.raises(SettingError, match="noise would make running variances negative"):
        with_buffer_policy(noised, LAYOUT, "average")
    assert with_buffer_policy(noised, LAYOUT, "local").local.personal_parameters == STATISTICS
    masked, _ = secagg().protect(strategies.fedavg(weighting="equal"), LOCAL, population)
    assert with_buffer_policy(masked, LAYOUT, "average").buffers == "average"  # a masked sum is exact


def test_what_is_no_mean_of_statistics_is_refused(data):
    with pytest.raises(SettingError, match="different model versions"):
        averaging(strategies.fedbuff())
    with pytest.raises(SettingError, match=r"sends beside updates \(change\)"):
        with_buffer_policy(strategies.scaffold(), LAYOUT, "local")
    with pytest.raises(SettingError, match="signs cannot update batch statistics"):
        averaging(strategies.signsgd())
    overshooting = Stage(server=Transform(update=lambda update_D, memory, context: (-9 * update_D, memory)))
    with pytest.raises(FedlearnError, match="variance fell below zero"):
        run(averaging(Strategy(select=everyone(), stages=(overshooting,))), data)


def test_scaffold_averages_statistics_as_fedavg_does_in_its_first_round(data):
    plain = replace(LOCAL, momentum=0.0)  # SCAFFOLD is correct for plain SGD only
    (item,), _ = run(averaging(strategies.scaffold()), data, rounds=1, local=plain)
    equal = Strategy(select=everyone(), aggregate=mean(weighting="equal"))
    (other,), _ = run(averaging(equal), data, rounds=1, local=plain)
    at = LAYOUT.positions(STATISTICS)
    np.testing.assert_allclose(item.state.params_D[at], other.state.params_D[at], atol=1e-6)


def test_a_model_with_buffers_is_never_stepped_together_with_others_in_torch():
    assert TORCH.describe_batching(1000, 10_000) == "map"
    with pytest.raises(SettingError, match="keeps buffers"):
        TORCH.with_batching("vmap")
