"""Each batching gives the same model; a worker process that dies or fails is only a failure of its clients."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, SettingError, federate, serial, start, vector
from fedlearn.algorithm import plain_training
from fedlearn.core import ClientWork, Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.testing import LinearTrainer, check_trainer, linear_problem
from fedlearn.trainers.process_pool import ProcessPoolTrainer, balance_shares
from simulations import models

# the forked children never touch JAX, whose threads in this process are idle
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
SIZES = [1, 5, 33, 64, 100, 7, 50, 20, 3, 12, 150, 40] * 3


@pytest.fixture(scope="module")
def data(digits):
    x, y = digits
    assignment = np.repeat(np.arange(len(SIZES)), SIZES)
    return from_arrays(x[: len(assignment)], y[: len(assignment)], assignment=assignment, task="multiclass")


def trained(data, engine, strategy, *, rounds=20, **local):
    state = start(strategy, engine.trainer.init(1), engine, seed=1)
    plan = Schedule(rounds=rounds, max_failures=0.0)
    for done in federate(strategy, engine, state, schedule=plan, local=LocalSettings(batch_size=16, **local)):
        state = done.state
    engine.close()
    return state.params_D


@pytest.mark.parametrize(
    ("framework", "model"),
    [
        ("torch", "linear"),
        pytest.param("torch", "mlp", marks=pytest.mark.slow),
        pytest.param("jax", "linear", marks=pytest.mark.slow),
        ("jax", "mlp"),
    ],
)
def test_results_do_not_depend_on_batching_or_block_size(data, framework, model):
    pytest.importorskip(framework)
    trainer, _ = models.build_trainer(model, data, input_shape=(8, 8, 1), framework=framework)
    strategy = strategies.fedprox(mu=0.1, clients_per_round=34)
    one_by_one = trained(data, serial(data, trainer.with_batching("map")), strategy, learning_rate=0.05)
    ways = [("map", None), ("map", 7), ("vmap", None), ("vmap", 7), ("auto", None)]
    ways += [("process_pool", None), ("process_pool", 7)] if framework == "torch" else []
    for batching, block_size in ways:
        engine = vector(data, trainer, batching=batching, block_size=block_size)
        end = trained(data, engine, strategy, learning_rate=0.05)
        exact = framework == "torch" and batching in ("map", "process_pool")
        assert np.abs(end - one_by_one).max() <= (0 if exact else 1e-5), (batching, block_size)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_clients_stepping_together_keep_the_trainer_contract(data, framework):
    pytest.importorskip(framework)
    trainer, _ = models.build_trainer("mlp", data, input_shape=(8, 8, 1), framework=framework)
    check_trainer(trainer.with_batching("vmap"), [data.train(k) for k in range(8)], tolerance=1e-6)


@pytest.mark.parametrize("local", [{"momentum": 0.9}, {"optimizer": "adamw", "learning_rate": 1e-3}], ids=str)
def test_a_client_that_is_done_earlier_stays_as_it_is(data, local):
    pytest.importorskip("torch")
    trainer, _ = models.build_trainer("mlp", data, input_shape=(8, 8, 1))
    strategy = strategies.fedavg(clients_per_round=12)
    in_turn = trained(data, vector(data, trainer, batching="map"), strategy, rounds=1, **local)
    together = trained(data, vector(data, trainer, batching="vmap"), strategy, rounds=1, **local)
    assert np.abs(in_turn - together).max() <= 1e-6


def test_a_model_that_draws_random_numbers_does_not_step_together():
    torch = pytest.importorskip("torch")
    from fedlearn.trainers.torch import TorchTrainer

    drawing = TorchTrainer(torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout()), task="regression")
    assert drawing.describe_batching(1000, 1000) == "map"
    with pytest.raises(SettingError, match="batching is vmap"):
        vector(linear_problem(), drawing, batching="vmap")


@pytest.mark.parametrize(("setting", "value"), [("batching", "fast"), ("block_size", 0), ("block_size", "big")])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(SettingError, match=f"{setting} is {value}"):
        vector(linear_problem(), LinearTrainer(3), **{setting: value})


def test_workers_are_for_torch():
    with pytest.raises(SettingError, match="batching is process_pool"):
        vector(linear_problem(), LinearTrainer(3), batching="process_pool")


def test_shares_are_balanced_by_size_and_lose_nobody():
    shares = balance_shares([100, 1, 50, 49, 2], 2)
    assert sorted(np.concatenate(shares).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(sum([100, 1, 50, 49, 2][k] for k in share) for share in shares) == [101, 101]
    assert len(balance_shares([5, 5], 8)) == 2


def test_workers_keep_the_contract_of_the_trainer_they_spread():
    data = linear_problem()
    clients = [data.train(k) for k in range(6)]
    numbered_as_in_the_kit = replace(data, clients=range(0, 18, 3), train=lambda client: clients[client // 3])
    workers = ProcessPoolTrainer(LinearTrainer(3), numbered_as_in_the_kit, num_processes=3)
    check_trainer(workers, clients, tolerance=0)
    workers.close()


class Stumbling(LinearTrainer):
    def fit(self, order, rule, work):
        if any(one.client == 2 for one in work):
            raise ValueError("cannot train on this")
        return super().fit(order, rule, work)


class Dying(LinearTrainer):
    """Kills the process that trains client 2, unless it is the main process."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.home = os.getpid()

    def fit(self, order, rule, work):
        if any(one.client == 2 for one in work) and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(order, rule, work)


def one_round(trainer):
    from fedlearn.engines.base import InProcessEngine

    data = linear_problem()
    engine = InProcessEngine(data, ProcessPoolTrainer(trainer, data, num_processes=6), block_size=6)
    strategy = strategies.fedavg()
    state = start(strategy, trainer.init(1), engine, seed=1)
    done = next(federate(strategy, engine, state, schedule=Schedule(rounds=1), local=LocalSettings(batch_size=4)))
    engine.close()
    return done


def test_an_error_in_a_worker_is_that_clients_failure():
    done = one_round(Stumbling(3))
    assert [(f.client, f.stage, f.reason) for f in done.failures] == [(2, "fit", "ValueError: cannot train on this")]
    assert done.num_updates == 5


def test_a_worker_that_is_killed_costs_nothing_but_time():
    began = time.monotonic()
    assert np.array_equal(one_round(Dying(3)).state.params_D, one_round(LinearTrainer(3)).state.params_D)
    assert time.monotonic() - began < 120


def test_updates_that_are_still_held_stay_as_they_are_and_memory_of_others_serves_again():
    data = linear_problem()
    workers = ProcessPoolTrainer(LinearTrainer(3), data, num_processes=3)
    work = [ClientWork(client=k, examples=data.train(k)) for k in range(4)]

    def fitted(round):
        return workers.fit(Request(round=round, seed=1, params_D=workers.init(round)), plain_training, work).delta_KD

    def alone(round):
        order = Request(round=round, seed=1, params_D=workers.init(round))
        return workers.trainer.fit(order, plain_training, work).delta_KD

    first = fitted(1)
    row, place = first[2], first.ctypes.data
    del first
    second = fitted(2)
    assert np.array_equal(row, alone(1)[2])
    assert np.array_equal(second, alone(2))
    assert second.ctypes.data != place
    del row
    third = fitted(3)
    assert third.ctypes.data == place
    assert np.array_equal(third, alone(3))
    assert np.array_equal(second, alone(2))
    workers.close()


def test_all_processes_predict_and_give_the_bits_of_the_trainer():
    data = linear_problem()
    workers = ProcessPoolTrainer(Counting(3), data, num_processes=3)
    x = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32)
    work = [ClientWork(client=k, examples=data.train(k)) for k in range(4)]
    workers.fit(Request(round=1, seed=1, params_D=workers.init(1)), plain_training, work)
    workers.trainer.rows = 0
    params_D, expected = workers.init(1) + 1, LinearTrainer(3).predict(workers.init(1) + 1, x)
    assert np.array_equal(workers.predict(params_D, x), expected)
    assert workers.trainer.rows == 2 * 5_000  # parts 0 and 3 of four
    assert workers._team is not None
    os.kill(workers._team.children[0].pid, signal.SIGKILL)
    assert np.array_equal(workers.predict(params_D, x), expected)
    workers.close()
    assert np.array_equal(workers.predict(params_D, x), expected)


class Counting(LinearTrainer):
    """Counts the rows that this process predicts."""

    rows = 0

    def predict(self, params_D, x):
        self.rows += len(x)
        return super().predict(params_D, x)


def test_children_end_when_the_workers_are_closed():
    data = linear_problem()
    workers = ProcessPoolTrainer(LinearTrainer(3), data, num_processes=3)
    order = Request(round=1, seed=1, params_D=workers.init(1))
    workers.fit(order, plain_training, [ClientWork(client=k, examples=data.train(k)) for k in range(4)])
    team = workers._team
    assert team is not None
    assert all(child.is_alive() for child in team.children)
    workers.close()
    assert not any(child.is_alive() for child in team.children)
