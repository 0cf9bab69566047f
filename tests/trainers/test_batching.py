"""Each batching gives the same model; a worker process that dies or fails is only a failure of its clients."""

import os
import signal
import time

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, SettingError, federate, serial, start, vector
from fedlearn.core import Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.engines import shared_arrays
from fedlearn.engines.base import InProcessEngine
from fedlearn.engines.block_training import Block, BlockTrainer
from fedlearn.engines.process_pool import ProcessPool
from fedlearn.testing import LinearTrainer, check_trainer, linear_problem
from fedlearn.trainers.batching import balance_shares
from simulations import models

# the forked children never touch JAX, whose threads in this process are idle
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
PLAIN = strategies.fedavg()
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
        exact = framework == "torch" and batching in ("map", "process_pool", "auto")
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


class Stumbling(LinearTrainer):
    def fit(self, order, rule, work):
        if any(item.client == 2 for item in work):
            raise ValueError("cannot train on this")
        return super().fit(order, rule, work)


class Dying(LinearTrainer):
    """Kills the process that trains client 2, unless it is the main process."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.home = os.getpid()

    def fit(self, order, rule, work):
        if any(item.client == 2 for item in work) and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(order, rule, work)


def one_round(trainer, num_processes=6):
    data = linear_problem()
    pool = ProcessPool(trainer, data, num_processes=num_processes)
    engine = InProcessEngine(data, trainer, block_size=6, pool=pool)
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


def pool_of(trainer, data=None, **settings):
    return ProcessPool(trainer, data or linear_problem(), num_processes=3, **settings)


def blocks_of(trainer, round=1):
    request = Request(round=round, seed=1, params_D=trainer.init(round))
    return [Block(clients=[k], requests=[request]) for k in range(6)]


def test_updates_in_use_keep_their_values_and_memory_of_others_serves_again(monkeypatch):
    monkeypatch.setattr(shared_arrays, "MIN_SHARED_BYTES", 0)
    pool = pool_of(LinearTrainer(3))
    expected = [next(BlockTrainer(pool.data, pool.trainer).train(PLAIN, block)) for block in blocks_of(pool)]
    kept = list(pool.train(PLAIN, blocks_of(pool)))
    assert all(np.array_equal(a.delta_KD, b.delta_KD) for a, b in zip(kept, expected, strict=True))
    places = [update.delta_KD.ctypes.data for update in pool.train(PLAIN, blocks_of(pool))]
    assert len(set(places)) < 6
    assert all(np.array_equal(a.delta_KD, b.delta_KD) for a, b in zip(kept, expected, strict=True))
    pool.close()
    assert all(np.array_equal(a.delta_KD, b.delta_KD) for a, b in zip(kept, expected, strict=True))


def test_all_processes_predict_and_give_the_bits_of_the_trainer():
    trainer = Counting(3)
    pool = pool_of(trainer)
    x = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32)
    assert list(pool.train(PLAIN, blocks_of(pool)))
    params_D, expected = pool.init(1) + 1, LinearTrainer(3).predict(pool.init(1) + 1, x)
    trainer.rows = 0
    assert np.array_equal(pool.predict(params_D, x), expected)
    assert trainer.rows == 0, "this process only distributes the parts"
    os.kill(pool.processes[0].pid, signal.SIGKILL)
    assert np.array_equal(pool.predict(params_D, x), expected)
    assert trainer.rows == 20_000
    pool.close()
    assert np.array_equal(pool.predict(params_D, x), expected)


class Counting(LinearTrainer):
    """Counts the rows that this process predicts."""

    rows = 0

    def predict(self, params_D, x):
        self.rows += len(x)
        return super().predict(params_D, x)


def test_processes_end_when_the_pool_is_closed_or_its_results_are_dropped():
    pool = pool_of(LinearTrainer(3))
    for end in (lambda results: pool.close(), lambda results: results.close()):
        results = pool.train(PLAIN, blocks_of(pool))
        next(results)
        processes = pool.processes
        assert len(processes) == 3
        end(results)
        assert not any(process.is_alive() for process in processes)
        assert not pool.processes
