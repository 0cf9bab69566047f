"""Torch and JAX give equal results; a client gives the same result alone and in a block."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn import (
    Examples,
    FederatedData,
    LocalRule,
    LocalSettings,
    Schedule,
    SettingError,
    Strategy,
    everyone,
    federate,
    start,
)
from fedlearn.algorithm import plain_training
from fedlearn.core import ClientWork, Request
from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.engines.base import serial, vector
from fedlearn.loop.client_update import client_step, client_step_mixed_rounds
from fedlearn.testing import check_trainer, check_twins
from fedlearn.trainers.batching import batch_plans
from simulations import models

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
nn = torch.nn
PLAN = [[[5, 1, 2, 3, 4, 0]]]  # batches of client 7 with 6 examples, in round 1 of seed 1
SIZES = [1, 5, 33, 64, 100, 7, 50, 20]


@pytest.fixture(scope="module")
def clients(digits):
    x, y = digits
    ends = np.cumsum(SIZES)
    return [Examples(x[end - n : end], y[end - n : end]) for n, end in zip(SIZES, ends, strict=True)]


@pytest.fixture(scope="module")
def data(clients):
    ids = range(len(clients))
    return FederatedData(
        task="multiclass", num_classes=10, clients=ids, train=clients.__getitem__, test=clients.__getitem__
    )


def trainer(data, framework, model):
    return models.build_trainer(model, data, input_shape=(8, 8, 1), framework=framework)[0]


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_torch_keeps_the_trainer_contract_bit_for_bit(data, clients, model):
    check_trainer(trainer(data, "torch", model), clients, tolerance=0)


@pytest.mark.parametrize("model", ["linear", "mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_jax_keeps_the_trainer_contract(data, clients, model):
    check_trainer(trainer(data, "jax", model), clients, tolerance=1e-6)


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_the_models_are_twins(data, clients, model):
    check_twins(trainer(data, "torch", model), trainer(data, "jax", model), clients)


def run(data, built, engine, strategy, *, rounds=20, **local):
    ready = engine(data, built)
    state = start(strategy, built.init(1), ready, seed=1)
    plan = Schedule(rounds=rounds, max_failures=0.0)
    for done in federate(strategy, ready, state, schedule=plan, local=LocalSettings(batch_size=16, **local)):
        state = done.state
    return np.asarray(state.params_D)


AGREE = [
    pytest.param(model, name, marks=[pytest.mark.slow] if model == "cnn" and name != "fedavg" else [])
    for model in ("mlp", "cnn")
    for name in ("fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedavgm")
]


@pytest.mark.parametrize(("model", "name"), AGREE)
def test_after_20_rounds_frameworks_and_engines_agree(data, name, model):
    import strategies

    strategy = getattr(strategies, name)(clients_per_round=4)
    ends = {
        (framework, engine.__name__): run(data, trainer(data, framework, model), engine, strategy)
        for framework in ("torch", "jax")
        for engine in (serial, vector)
    }
    first = ends["torch", "serial"]
    assert np.array_equal(first, ends["torch", "vector"])
    assert np.abs(ends["jax", "serial"] - ends["jax", "vector"]).max() <= 1e-5
    assert np.abs(first - ends["jax", "vector"]).max() <= 1e-4
    assert np.abs(first - trainer(data, "torch", model).init(1)).max() > 1e-2


@pytest.mark.parametrize(
    "local",
    [
        {"momentum": 0.9, "learning_rate": 0.05},
        {"weight_decay": 0.01},
        {"steps": 3},
        {"epochs": 3},
        {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_local_optimisers_mean_the_same_in_both_frameworks(data, clients, local):
    settings = LocalSettings(**{"batch_size": 16, **local})
    work = [ClientWork(client=k, examples=examples) for k, examples in enumerate(clients)]
    ends = []
    for framework in ("torch", "jax"):
        built = trainer(data, framework, "mlp")
        order = Request(round=1, seed=1, params_D=built.init(1), local=settings)
        ends.append(np.asarray(built.fit(order, plain_training, work).delta_KD))
    assert np.abs(ends[0] - ends[1]).max() <= 1e-5


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
def test_local_sgd_is_torch_optim_sgd(clients, momentum, weight_decay):
    from fedlearn.trainers.torch import TorchTrainer

    local = LocalSettings(steps=5, batch_size=100, learning_rate=0.1, momentum=momentum, weight_decay=weight_decay)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    built = TorchTrainer(module, task="multiclass")
    order = Request(round=1, seed=1, params_D=built.init(1), local=local)
    ours = built.fit(order, plain_training, [ClientWork(client=0, examples=clients[4])]).delta_KD[0]
    weights = built.layout.unpack(built.init(1))
    theirs = nn.Linear(64, 10)
    theirs.load_state_dict({name: torch.from_numpy(weights[f"1.{name}"]) for name in ("weight", "bias")})
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(5):
        optimizer.zero_grad()
        logits = theirs(torch.from_numpy(clients[4].x).flatten(1))
        nn.functional.cross_entropy(logits, torch.from_numpy(clients[4].y)).backward()
        optimizer.step()
    after = {f"1.{name}": p.detach().numpy() for name, p in theirs.named_parameters()}
    assert np.abs(built.init(1) + ours - built.layout.pack(after)).max() <= 1e-6


def test_fedprox_without_weight_is_fedavg_and_with_a_large_one_clients_stay_put(data):
    import strategies

    for framework in ("torch", "jax"):
        built = trainer(data, framework, "mlp")
        ends = [
            run(data, built, vector, strategy, rounds=3, learning_rate=0.001, epochs=5)
            for strategy in (strategies.fedavg(), strategies.fedprox(mu=0.0), strategies.fedprox(mu=900.0))
        ]
        assert np.array_equal(ends[0], ends[1])
        moved = [np.linalg.norm(end - built.init(1)) for end in ends]
        assert moved[2] < 0.3 * moved[0]


@pytest.mark.parametrize(
    ("framework", "batching", "tolerance"),
    [("torch", "map", 0), ("torch", "vmap", 1e-5), ("jax", "map", 1e-5), ("jax", "vmap", 1e-5), ("mixed", "map", 1e-5)],
)
def test_clients_that_were_sent_different_models_train_in_one_block_as_each_alone(
    data, clients, framework, batching, tolerance
):
    rule = LocalRule(
        correct=lambda grad, w, w_global, past, pull: grad + 0.1 * past + pull * (w - w_global),
        client_state=("past",),
        receives=("pull",),
    )
    strategy = Strategy(select=everyone(), local=rule)
    built = trainer(data, framework, "mlp").with_batching(batching)
    some_8D = np.random.default_rng(1).normal(0, 0.1, (8, built.layout.num_parameters)).astype(np.float32)
    orders = [Request(round=k + 1, seed=1, params_D=built.init(k), broadcast={"pull": some_8D[k]}) for k in range(4)]
    work = [ClientWork(client=k, examples=clients[k], client_state={"past": some_8D[4 + k]}) for k in range(4)]
    together = client_step_mixed_rounds(built, strategy, orders, work)
    for order, item, mixed in zip(orders, work, together, strict=True):
        alone, _ = client_step(built, strategy, order, [item])
        assert np.allclose(mixed.delta_KD, alone.delta_KD, rtol=0, atol=tolerance)


def test_sizes_from_1_to_200_give_the_same_in_one_block_as_alone(digits, data):
    x, y = digits
    work = [
        ClientWork(client=n, examples=Examples(x[:n], y[:n])) for n in (*range(1, 12), 31, 32, 33, 64, 65, 127, 200)
    ]
    for framework, tolerance in (("torch", 0), ("jax", 1e-6)):
        built = trainer(data, framework, "mlp")
        order = Request(round=1, seed=1, params_D=built.init(1), local=LocalSettings(batch_size=16))
        together = np.asarray(built.fit(order, plain_training, work).delta_KD)
        alone = np.stack([np.asarray(built.fit(order, plain_training, [item]).delta_KD)[0] for item in work])
        assert np.abs(together - alone).max() <= tolerance


@pytest.mark.parametrize("apart", [False, True])
def test_cohorts_of_other_clients_and_other_sizes_share_what_jax_has_compiled(digits, data, apart):
    x, y = digits
    built, rng, seen = trainer(data, "jax", "linear").with_batching("map"), np.random.default_rng(0), set()
    for round in range(1, 21):  # about 30 clients, drawn by Poisson sampling
        sizes = np.minimum(200, rng.lognormal(3, 0.7, rng.poisson(30)).astype(int) + 1)
        work = [
            ClientWork(client=k, examples=Examples(x[:n].copy() if apart else x[:n], y[:n]))
            for k, n in enumerate(sizes)
        ]
        order = Request(round=round, seed=1, params_D=built.init(1), local=LocalSettings(batch_size=10))
        built.fit(order, plain_training, work)
        seen.add((len(work), -(-max(sizes) // 10)))
    settings = LocalSettings(batch_size=10)
    programs = built._block("map", plain_training, settings, False, False)._cache_size()
    assert len(seen) > 15
    assert programs <= 8  # the number of steps grows at most twice; 13 to 22 clients per core are rounded up


@pytest.mark.parametrize(("num_examples", "largest"), [(1414, 120), (1446, 255), (1500, 97)])
def test_partitions_of_other_seeds_share_one_program(num_examples, largest):
    pytest.importorskip("jax")
    from fedlearn.trainers.jax.block_arrays import BlockArrays

    def shapes(num_examples, largest):
        arrays, local = BlockArrays(), LocalSettings(batch_size=32)
        x = np.zeros((num_examples, 64), np.float32)
        plan = np.zeros((20, -(-largest // 32), 32), np.int32)
        inputs, _ = arrays.inputs([x[:9], x[9:]])
        return inputs.shape, arrays.pad_plan(plan, local, largest).shape

    assert shapes(num_examples, largest) == shapes(1431, 200)


class TorchDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.drop = nn.Linear(64, 10), nn.Dropout(0.5)

    def forward(self, x):
        return self.out(self.drop(x.flatten(1)))


def with_dropout(framework):
    if framework == "torch":
        from fedlearn.trainers.torch import TorchTrainer

        return TorchTrainer(TorchDropout(), task="multiclass", initial=default_initial_parameters)
    from flax import linen

    from fedlearn.trainers.jax import JaxTrainer

    class Dropout(linen.Module):
        @linen.compact
        def __call__(self, x, *, train=False):
            x = linen.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
            return linen.Dense(10, name="out")(x)

    return JaxTrainer(Dropout(), task="multiclass", input_shape=(8, 8, 1))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_dropout_draws_per_client_and_round_whatever_the_block(clients, framework):
    built = with_dropout(framework)
    check_trainer(built, clients[2:5], tolerance=1e-6)
    twice = [ClientWork(client=client, examples=clients[4]) for client in (1, 2)]
    local = LocalSettings(steps=1, batch_size=100)  # one full batch: the clients differ only by dropout
    order = Request(round=1, seed=1, params_D=built.init(1), local=local)
    item, other = np.asarray(built.fit(order, plain_training, twice).delta_KD)
    assert not np.array_equal(item, other)


def test_torchs_global_generator_is_left_as_it_was(clients):
    built = with_dropout("torch")
    order = Request(round=1, seed=1, params_D=built.init(1))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    built.fit(order, plain_training, [ClientWork(client=0, examples=clients[2])])
    assert torch.equal(torch.rand(3), expected)


def test_state_that_no_policy_knows_is_refused():
    from flax import linen

    from fedlearn.trainers.jax import JaxTrainer

    class Counting(linen.Module):
        @linen.compact
        def __call__(self, x, *, train=False):
            self.variable("seen", "count", lambda: 0)
            return linen.Dense(1)(x)

    with pytest.raises(SettingError, match="module is a model with the state seen"):
        JaxTrainer(Counting(), task="binary", input_shape=(4,))


def test_frozen_torch_parameters_do_not_travel_and_do_not_move(clients):
    from fedlearn.trainers.torch import TorchTrainer

    body, head = nn.Linear(64, 16), nn.Linear(16, 10)
    for parameter in body.parameters():
        parameter.requires_grad = False
    before = body.weight.detach().clone()
    built = TorchTrainer(nn.Sequential(nn.Flatten(), body, nn.ELU(), head), task="multiclass")
    assert built.layout == Layout.from_shapes([("3.bias", (10,)), ("3.weight", (10, 16))])
    check_trainer(built, clients[2:5], tolerance=0)
    assert torch.equal(body.weight, before)


def test_a_modules_own_parameters_can_be_the_initial_ones():
    from fedlearn.trainers.torch import TorchTrainer

    module = nn.Linear(3, 1)
    current = torch.cat([module.bias.detach(), module.weight.detach().flatten()]).numpy().copy()
    built = TorchTrainer(module, task="regression")
    built.predict(np.zeros(4, np.float32), np.ones((2, 3), np.float32))
    assert np.array_equal(built.init(1), current)


def plans(sizes, *, clients=None, round=1, **local):
    order = Request(round=round, seed=1, params_D=None, local=LocalSettings(**local))
    return batch_plans(order, np.arange(len(sizes)) if clients is None else np.array(clients), np.array(sizes))


def test_a_batch_plan_visits_every_example_once_a_pass_and_stops_after_its_steps():
    (plan,), (steps,) = plans([10], batch_size=4, epochs=2)
    assert plan.shape == (6, 4)
    assert steps == 6
    for one_pass in (plan[:3], plan[3:]):
        assert sorted(one_pass[one_pass >= 0].tolist()) == list(range(10))
        assert (one_pass >= 0).sum(axis=1).tolist() == [4, 4, 2]
    assert plans([10], batch_size=4, steps=100)[0].shape == (1, 100, 4)
    assert plans([1], batch_size=4, steps=5)[0].tolist() == [[[0]] * 5]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 7), st.booleans())
def test_a_clients_batches_do_not_depend_on_its_block(sizes, batch_size, amount, in_steps):
    local = {"batch_size": batch_size, "steps" if in_steps else "epochs": amount}
    together, steps = plans(sizes, **local)
    for k, size in enumerate(sizes):
        (alone,), (own_steps,) = plans([size], clients=[k], **local)
        assert steps[k] == own_steps == len(alone)
        assert np.array_equal(together[k, :own_steps, : alone.shape[1]], alone)
        assert (together[k, own_steps:] == -1).all()
        assert (together[k, :, alone.shape[1] :] == -1).all()


def test_orders_differ_between_clients_rounds_and_passes_and_are_uniform():
    both, _ = plans([50, 50], batch_size=50, epochs=2)
    later, _ = plans([50, 50], batch_size=50, epochs=2, round=2)
    orders = [tuple(order) for plan in (both, later) for client in plan for order in client]
    assert len(set(orders)) == 8
    first = plans([7] * 7000, batch_size=7)[0][:, 0, 0]
    counts = np.bincount(first, minlength=7)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 6 / 7)


def test_batches_are_the_same_on_every_machine_and_in_every_version():
    assert plans([6], clients=[7], batch_size=6)[0].tolist() == PLAN


def test_the_loss_reported_is_the_mean_over_the_examples_seen(data, clients):
    for framework in ("torch", "jax"):
        built = trainer(data, framework, "linear")
        still = LocalSettings(learning_rate=0.0, batch_size=16)
        order = Request(round=1, seed=1, params_D=built.init(1), local=still)
        loss = built.fit(order, plain_training, [ClientWork(client=0, examples=clients[4])]).metrics["loss"]
        logits = built.predict(built.init(1), clients[4].x).astype(np.float64)
        log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = -log_probability[np.arange(100), clients[4].y].mean()
        assert loss.mean == pytest.approx(expected, rel=1e-5)


def test_each_framework_trains_without_the_other_being_imported():
    code = (
        "import sys, importlib; importlib.import_module('fedlearn.trainers.{}');"
        "importlib.import_module('simulations.models.basic.{}'); print('{}' in sys.modules)"
    )
    for current, other in (("torch", "jax"), ("jax", "torch")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(current, current, other)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.strip() == "False"


def test_a_client_diverging_in_a_block_leaves_the_others_untouched(data, clients):
    from fedlearn.loop.client_update import client_step
    from strategies import fedavg

    for framework in ("torch", "jax"):
        built = trainer(data, framework, "mlp")
        order = Request(round=1, seed=1, params_D=built.init(1))
        work = [ClientWork(client=k, examples=clients[k]) for k in (2, 3, 4)]
        sound, _ = client_step(built, fedavg(), order, work)
        for k, others in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1])):
            nan = Examples(work[k].examples.x * np.float32("nan"), work[k].examples.y)
            mixed = [item._replace(examples=nan) if i == k else item for i, item in enumerate(work)]
            updates, failures = client_step(built, fedavg(), order, mixed)
            assert [f.client for f in failures] == [work[k].client]
            assert np.array_equal(np.asarray(updates.delta_KD), np.asarray(sound.delta_KD)[others])
