"""Optimizer states that the server averages, and mixed precision: arithmetic, engines, refusals."""

from functools import partial

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, SettingError, federate, serial, start, vector
from fedlearn.core import ClientWork, Request
from fedlearn.core.optimizers import STEPS
from fedlearn.core.records import ExampleDP
from fedlearn.data.from_arrays import from_arrays
from fedlearn.loop.local_training import initial_rule_state, train
from fedlearn.loop.optimizer_averaging import refuse_with_privacy, with_kept_optimizer
from fedlearn.testing import LinearTrainer, linear_problem
from simulations.models import build_trainer

torch = pytest.importorskip("torch")

OPTIMIZERS = [
    {"optimizer": "adam", "learning_rate": 0.01},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "adagrad", "learning_rate": 0.05},
    {"optimizer": "rmsprop", "learning_rate": 0.01},
    {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
]
SAMPLED = [OPTIMIZERS[0], *(pytest.param(local, marks=pytest.mark.slow) for local in OPTIMIZERS[1:])]


def problem(sizes=(13, 5, 8)):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(sum(sizes), 4)).astype(np.float32), np.arange(sum(sizes)) % 3
    return from_arrays(x, y, assignment=np.repeat(np.arange(len(sizes)), sizes), task="multiclass")


DATA = problem()


def build(framework="torch"):
    return build_trainer("mlp", DATA, input_shape=(4,), hidden=(5,), framework=framework)[0]


def end(local, *, trainer=None, data=DATA, strategy=None, batching="map", stop=None, rounds=3):
    """Return the server state after some rounds; ``stop`` ends the run after this round and resumes it."""
    trainer, strategy = trainer or build(), strategy or strategies.fedavg(weighting="equal")
    engine = vector(data, trainer, batching=batching)
    state = start(strategy, trainer.init(1), engine, seed=1)
    settings = LocalSettings(**{"batch_size": 100, "steps": 2, **local})
    for last in (stop, rounds) if stop else (rounds,):
        *_, done = federate(strategy, engine, state, schedule=Schedule(rounds=last), local=settings)
        state = done.state
    return state


@pytest.mark.parametrize("local", SAMPLED, ids=str)
def test_the_average_of_a_client_alone_is_what_it_keeps(local):
    data = problem(sizes=(8,))
    averaged, kept, reset = (
        end({**local, "optimizer_state": policy}, data=data).params_D for policy in ("average", "keep", "reset")
    )
    assert np.abs(averaged - kept).max() <= 1e-6
    assert np.abs(averaged - reset).max() > 1e-4


def test_the_server_sends_the_mean_of_the_states_of_the_last_round():
    local = LocalSettings(batch_size=100, steps=2, optimizer="adam", learning_rate=0.01, optimizer_state="average")
    trainer, strategy = build(), with_kept_optimizer(strategies.fedavg(weighting="equal"), local)
    params_D = trainer.init(1)
    new = initial_rule_state(strategy.local, trainer.layout, params_D)
    work = [ClientWork(client=k, examples=DATA.train(k), client_state=new) for k in range(3)]
    updates = train(trainer, strategy.local, Request(round=1, seed=1, params_D=params_D, local=local), work)
    assert updates.client_state == {}
    state = end({"optimizer": "adam", "learning_rate": 0.01, "optimizer_state": "average"}, rounds=1)
    for name in ("optimizer.first", "optimizer.second"):
        assert np.allclose(state.server[name], np.mean(updates.extra[name], axis=0), atol=1e-7)
        assert np.abs(state.server[name]).max() > 0
    assert np.all(state.server[STEPS] == 2)


@pytest.mark.parametrize("local", SAMPLED, ids=str)
def test_averaged_states_do_not_depend_on_batching_and_stops(local):
    local = {**local, "optimizer_state": "average", "batch_size": 4}
    model_D = end(local).params_D
    assert np.array_equal(model_D, end(local, batching="vmap").params_D)
    assert np.array_equal(model_D, end(local, stop=1).params_D)


@pytest.mark.slow
@pytest.mark.parametrize("local", OPTIMIZERS, ids=str)
def test_jax_averages_the_states_of_torch(local):
    local = {**local, "optimizer_state": "average", "batch_size": 4}
    model_D = end(local).params_D
    for framework, batching in (("jax", "map"), ("jax", "vmap"), ("mixed", "map")):
        assert np.abs(model_D - end(local, trainer=build(framework), batching=batching).params_D).max() <= 5e-5


def test_averaged_states_are_refused_where_they_would_leave_without_noise():
    local = LocalSettings(optimizer="adam", optimizer_state="average")
    rule = with_kept_optimizer(strategies.fedavg(), local).local
    for kind in ("central", "local", "ftrl", "secagg", "distributed"):
        with pytest.raises(SettingError, match=f"privacy={kind} protects updates"):
            refuse_with_privacy(rule, kind)
    for kind in ("none", "example"):
        refuse_with_privacy(rule, kind)
    refuse_with_privacy(with_kept_optimizer(strategies.fedavg(), LocalSettings(optimizer="adam")).local, "central")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (strategies.fedper(), "personal parameters would leave"),
        (strategies.fedrep(), "trains the parts of the model"),
        (strategies.fedbuff(), "asynchronous strategy"),
    ],
    ids=["fedper", "fedrep", "fedbuff"],
)
def test_averaged_states_are_refused_by_name(strategy, message):
    with pytest.raises(SettingError, match=message):
        with_kept_optimizer(strategy, LocalSettings(optimizer="adam", optimizer_state="average"))


def test_a_server_optimizer_keeps_its_own_state_beside_the_average():
    local = LocalSettings(optimizer="adam", optimizer_state="average")
    once = with_kept_optimizer(strategies.fedavgm(), local)
    assert with_kept_optimizer(once, local).server is once.server
    state = end({"optimizer": "adam", "optimizer_state": "average"}, strategy=strategies.fedavgm())
    assert {"optimizer.first", "optimizer.second", STEPS} < set(state.server)


# mixed precision


@pytest.mark.parametrize(
    ("framework", "batching"),
    [
        ("torch", "map"),
        ("torch", "vmap"),
        pytest.param("jax", "map", marks=pytest.mark.slow),
        pytest.param("jax", "vmap", marks=pytest.mark.slow),
    ],
)
def test_mixed_precision_is_close_to_float32(framework, batching):
    """Check training in bfloat16, whose numbers have eight bits, in each framework."""
    local = {"batch_size": 4, "steps": 5, "learning_rate": 0.1}
    exact_D, start_D = end(local).params_D, build().init(1)
    mixed_D = end({**local, "precision": "bfloat16"}, trainer=build(framework), batching=batching).params_D
    difference, moved = np.abs(mixed_D - exact_D).max(), np.abs(exact_D - start_D).max()
    assert 1e-7 < difference < 0.03 * moved
    assert np.asarray(mixed_D).dtype == np.float32


@pytest.mark.slow
def test_mixed_precision_works_with_a_penalty_and_a_second_gradient():
    for strategy in (strategies.moon(), strategies.fedsam(), strategies.feddecorr()):
        exact_D = end({"batch_size": 4}, strategy=strategy).params_D
        for framework in ("torch", "jax"):
            mixed_D = end(
                {"batch_size": 4, "precision": "bfloat16"}, strategy=strategy, trainer=build(framework)
            ).params_D
            assert 1e-7 < np.abs(mixed_D - exact_D).max() < 5e-3


def test_mixed_precision_is_refused_where_it_cannot_be_honoured():
    with pytest.raises(SettingError, match="precision is float16"):
        LocalSettings(precision="float16")
    with pytest.raises(SettingError, match=r"local\.precision is bfloat16"):
        LocalSettings(precision="bfloat16", example_dp=ExampleDP())
    with pytest.raises(SettingError, match=r"local\.precision is bfloat16"):
        LinearTrainer(3).check_local(LocalSettings(precision="bfloat16"))
    engine = serial(linear_problem(), LinearTrainer(3))
    state = start(strategies.fedavg(), LinearTrainer(3).init(1), engine, seed=1)
    rounds = partial(federate, schedule=Schedule(rounds=1), local=LocalSettings(precision="bfloat16"))
    with pytest.raises(SettingError, match=r"local\.precision is bfloat16"):
        next(rounds(strategies.fedavg(), engine, state))
