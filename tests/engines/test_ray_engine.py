from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing
from dataclasses import replace
from functools import partial
from inspect import signature

import numpy as np
import pytest

from fedlearn import (
    Context,
    Examples,
    LocalRule,
    LocalSettings,
    Scenario,
    Schedule,
    SettingError,
    Strategy,
    everyone,
    federate,
    mean,
    stacked,
    start,
    vector,
)
from fedlearn.algorithm.aggregation import PartialAggregate, accumulate, add_rows, add_totals, divide_total
from fedlearn.core.layout import Layout
from fedlearn.core.records import Failure, MetricSum, Updates
from fedlearn.engines.ray import engine as engine_module
from fedlearn.engines.ray.cluster import ClusterError, copy_arrays
from fedlearn.errors import MissingExtra
from fedlearn.privacy.mechanisms import central, local
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.runner.instantiation import rebuild_scenario
from fedlearn.runner.start import main
from fedlearn.testing import LinearTrainer, linear_problem
from fedlearn.testing.networks import HiddenLayerTrainer
from fedlearn.testing.problems import class_problem

LOCAL = LocalSettings(batch_size=4, learning_rate=0.05)


def median():
    return Strategy(
        select=everyone(),
        aggregate=stacked(lambda updates, state, context: (np.median(updates.delta_KD, axis=0), state)),
    )


def unmergeable():
    return Strategy(select=everyone(), aggregate=mean()._replace(merge=None))


def published():
    import strategies

    names = set(strategies.__all__) - {"feddecorr", "fedgkd", "fedlc", "fedntd", "moon"}  # need classes
    names -= {"fedit", "fedsa_lora", "ffa_lora", "flora"}  # need adapters
    takes = {name: signature(getattr(strategies, name)).parameters for name in sorted(names)}
    keeps = {
        name: {"personal_parameters": "out.bias"} if "personal_parameters" in taken else {}
        for name, taken in takes.items()
    }
    return {name: partial(getattr(strategies, name), **settings) for name, settings in keeps.items()}


def scaffold():
    return published()["scaffold"](clients_per_round=4)


OURS = {"median": median, "unmergeable": unmergeable, **published()}


# Scenarios that workers build. They are sent by value, because workers cannot import this file.


def linear(**changes):
    data = replace(linear_problem(), **changes)
    return Scenario(name="linear", data=data, trainer=LinearTrainer(3), model="linear")


def slow_at(seconds, *clients):
    def train(client):
        if not clients or client in clients:
            time.sleep(seconds)
        return linear_problem().train(client)

    return linear(train=train)


def waits_for_go(folder):
    """Return a scenario whose workers create a file when they train, and wait for the file "go"."""

    def train(client):
        (folder / str(os.getpid())).touch()
        until = time.monotonic() + 120
        while not (folder / "go").exists() and time.monotonic() < until:
            time.sleep(0.01)
        return linear_problem().train(client)

    return linear(train=train)


def faulty():
    def train(client):
        if client == 3:
            raise RuntimeError("disk gone")
        examples = linear_problem().train(client)
        return Examples(examples.x * np.float32("nan"), examples.y) if client == 1 else examples

    return linear(train=train)


def broken():
    raise FileNotFoundError("no data on this machine")


def wider():
    return Scenario(name="linear", data=linear_problem(), trainer=LinearTrainer(4), model="linear")


@pytest.fixture(scope="module")
def cluster():
    """Start a Ray cluster with two cores of this machine; engines in this process connect to it."""
    library = pytest.importorskip("ray", reason="ray is not installed")
    library.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    has = {"num_cpus": 2, "num_gpus": 1}  # a logical GPU only: Ray places workers by these numbers
    with warnings.catch_warnings(action="ignore"):
        library.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **has)
    yield library
    library.shutdown()


@pytest.fixture
def make_engine(cluster):
    """Return a function that builds an engine of two workers; the engines are closed after the test."""
    engines = []

    def make(build=linear, *, timeout=120.0, num_workers=2, **settings):
        scenario = linear()
        engine = engine_module.ray(
            scenario.data, scenario.trainer, build, num_workers=num_workers, timeout=timeout, **settings
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def rounds_of(engine, strategy, *, rounds=20, params_D=None, local=LOCAL):
    engine.client_states.clear()
    params_D = LinearTrainer(3).init(1) if params_D is None else params_D
    state = start(strategy, params_D, engine, seed=1)
    return list(federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local))


def max_difference(item, other):
    """Return the largest difference between the final models of two runs."""
    return np.abs(np.asarray(item[-1].state.params_D) - np.asarray(other[-1].state.params_D)).max()


def test_every_strategy_ends_with_the_model_of_vector(make_engine):
    engine, here = make_engine(), vector(linear_problem(), LinearTrainer(3))
    for name, build in OURS.items():
        strategy = build()
        ours, theirs = rounds_of(engine, strategy), rounds_of(here, strategy)
        assert max_difference(ours, theirs) < 1e-5, name
        assert np.isclose(ours[-1].metrics["loss"], theirs[-1].metrics["loss"], rtol=1e-6), name
        for field in ("cohort", "num_examples", "bytes_up", "bytes_down", "num_updates"):
            assert getattr(ours[-1], field) == getattr(theirs[-1], field), (name, field)
        assert engine.client_states.keys() == here.client_states.keys(), name
        for client, memory in here.client_states.items():
            assert all(np.allclose(engine.client_states[client][key], memory[key], atol=1e-4) for key in memory), name


def classes():
    return Scenario(name="classes", data=class_problem(), trainer=HiddenLayerTrainer(3, 3), model="hidden 3-4-3")


@pytest.mark.slow
def test_workers_apply_the_penalty_of_a_strategy(cluster):
    import strategies

    here = vector(class_problem(), HiddenLayerTrainer(3, 3))
    with closing(engine_module.ray(class_problem(), HiddenLayerTrainer(3, 3), classes, num_workers=2)) as engine:
        for name in ("moon", "fedntd", "fedgkd", "feddecorr"):
            strategy, params_D = getattr(strategies, name)(), here.trainer.init(1)
            ours, theirs = (rounds_of(made_by, strategy, rounds=3, params_D=params_D) for made_by in (engine, here))
            assert max_difference(ours, theirs) < 1e-5, name


LOCAL_TRAINING = [
    {"optimizer": "adam", "learning_rate": 0.01},
    {"optimizer": "adam", "learning_rate": 0.01, "optimizer_state": "keep"},
    {"optimizer": "adam", "learning_rate": 0.01, "optimizer_state": "average"},
    {"schedule": {"name": "cosine", "warmup": 1}, "momentum": 0.5},
    {"schedule": {"name": "linear", "over": "steps"}, "max_grad_norm": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize("local", LOCAL_TRAINING, ids=str)
def test_workers_train_with_the_optimizers_and_schedules_of_vector(make_engine, local):
    settings, here = LocalSettings(batch_size=4, **local), vector(linear_problem(), LinearTrainer(3))
    ours, theirs = (
        rounds_of(engine, Strategy(select=everyone()), rounds=3, local=settings) for engine in (make_engine(), here)
    )
    assert max_difference(ours, theirs) < 1e-6
    plain = rounds_of(here, Strategy(select=everyone()), rounds=3)
    assert max_difference(plain, theirs) > 1e-4


def test_protected_strategies_release_from_workers_what_they_release_here(make_engine):
    pytest.importorskip("dp_accounting", reason="needs fedlearn[privacy]")
    engine, here = make_engine(), vector(linear_problem(), LinearTrainer(3))
    equal, people = (
        Strategy(select=everyone(), aggregate=mean(weighting="equal")),
        Population(clients=range(6), rounds=3),
    )
    adaptive = central(noise_multiplier=0.5, clip="adaptive")
    for mechanism in (central(noise_multiplier=1.0), adaptive, local(noise_multiplier=1.0)):
        strategy, _ = mechanism.protect(equal, LOCAL, people)
        ours, theirs = (rounds_of(made_by, strategy, rounds=3) for made_by in (engine, here))
        assert max_difference(ours, theirs) < 1e-5
        assert ours[-1].privacy == theirs[-1].privacy
        assert (ours[-1].metrics, ours[-1].num_examples) == ({}, None)


def test_equal_seeds_give_equal_bits_and_with_a_block_size_any_number_of_workers_does(make_engine):
    engine = make_engine(block_size=2)
    once, again = rounds_of(engine, scaffold(), rounds=5), rounds_of(engine, scaffold(), rounds=5)
    assert max_difference(once, again) == 0
    engine.close()
    alone = make_engine(block_size=2, num_workers=1)
    assert alone.num_workers == 1
    assert max_difference(once, rounds_of(alone, scaffold(), rounds=5)) == 0


def several_inputs():
    import torch
    from torch import nn

    from fedlearn import TorchTrainer, from_arrays

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(20, 3), nn.Linear(5, 1)

        def forward(self, ids, numbers):
            return self.out(torch.cat([self.words(ids).mean(1), numbers], 1))

    rng = np.random.default_rng(1)
    numbers = rng.normal(size=(48, 2))
    x, y = {"ids": rng.integers(0, 20, (48, 7)), "numbers": numbers}, (numbers[:, 0] > 0).astype(np.int64)
    data = from_arrays(x, y, assignment=np.arange(48) % 6, task="binary", seed=1)
    return Scenario(name="several_inputs", data=data, trainer=TorchTrainer(Net(), task="binary"))


@pytest.mark.slow
def test_workers_train_a_model_with_several_inputs(cluster):
    pytest.importorskip("torch")
    scenario = several_inputs()
    params_D = scenario.trainer.init(1)
    here = rounds_of(vector(scenario.data, scenario.trainer), scaffold(), params_D=params_D)
    with closing(engine_module.ray(scenario.data, scenario.trainer, several_inputs, num_workers=2)) as engine:
        assert max_difference(rounds_of(engine, scaffold(), params_D=params_D), here) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_torch_and_jax_train_in_workers_what_they_train_here(cluster, framework):
    pytest.importorskip(framework)
    partition = {"_target_": "fedlearn.data.partition.Dirichlet", "num_clients": 6}
    digits = {"_target_": "simulations.scenarios.digits.digits", "framework": framework, "partition": partition}
    build = partial(rebuild_scenario, digits, ())
    scenario = build()
    local = LocalSettings(learning_rate=0.1)
    here = vector(scenario.data, scenario.trainer)
    with closing(engine_module.ray(scenario.data, scenario.trainer, build, num_workers=2)) as engine:
        for strategy in (scaffold(), published()["fedper"](personal_parameters="out.*")):
            params_D = scenario.trainer.init(1)
            theirs = rounds_of(here, strategy, params_D=params_D, local=local)
            assert max_difference(rounds_of(engine, strategy, params_D=params_D, local=local), theirs) < 1e-5
        clients = [5, 0, 3]
        for current in (None, strategy):
            expected = list(here.evaluate(params_D, clients, current))
            found = list(engine.evaluate(params_D, clients, current))
            assert [item.client for item in found] == [item.client for item in expected] == [0, 3, 5]
            for item, other in zip(found, expected, strict=True):
                assert np.allclose(item.outputs, other.outputs, atol=1e-5)
                assert np.array_equal(item.targets, other.targets)
    here.close()


def test_a_worker_killed_in_the_middle_of_a_round_is_replaced_and_the_result_is_the_same(make_engine, caplog, tmp_path):
    undisturbed = rounds_of(vector(linear_problem(), LinearTrainer(3)), scaffold(), rounds=3)
    engine = make_engine(partial(waits_for_go, tmp_path))
    before = sorted(engine.pids)

    def kill():
        until = time.monotonic() + 120
        while {path.name for path in tmp_path.iterdir()} != set(map(str, before)) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(before[0], signal.SIGKILL)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    rounds = rounds_of(engine, scaffold(), rounds=3)
    killer.join(120)
    assert before[0] not in engine.pids
    assert before[1] in engine.pids
    assert max_difference(rounds, undisturbed) < 1e-6
    assert not any(done.failures for done in rounds)
    assert f"worker process {before[0]} is gone" in caplog.text


def test_a_client_that_ends_every_worker_ends_the_run_and_is_named(make_engine):
    def deadly():
        return linear(train=lambda client: os._exit(1) if client == 2 else linear_problem().train(client))

    with pytest.raises(ClusterError, match=r"3 workers died, one after another, at round 1, 1 client \(2\)"):
        rounds_of(make_engine(deadly, block_size=1), Strategy(select=everyone()), rounds=1)


def test_a_worker_that_takes_too_long_is_told_by_name_and_does_not_block_the_next_round(make_engine):
    engine = make_engine(partial(slow_at, 600, 4), block_size=1)
    strategy = Strategy(select=everyone())
    began, engine._timeout = time.monotonic(), 1.5
    with pytest.raises(ClusterError, match=r"longer than engine.timeout=1.5 s for round 1, 1 client \(4\)"):
        rounds_of(engine, strategy, rounds=1)
    assert time.monotonic() - began < 120
    engine._timeout, engine.clients = 120.0, [0, 1, 2, 3]
    here = vector(replace(linear_problem(), clients=[0, 1, 2, 3]), LinearTrainer(3))
    assert max_difference(rounds_of(engine, strategy, rounds=1), rounds_of(here, strategy, rounds=1)) < 1e-6


def test_clients_that_fail_are_named_as_they_are_here(make_engine):
    strategy, schedule = Strategy(select=everyone()), Schedule(rounds=1, max_failures=0.5)

    def failures(engine):
        state = start(strategy, LinearTrainer(3).init(1), engine, seed=1)
        (item,) = federate(strategy, engine, state, schedule=schedule, local=LOCAL)
        return {(failure.client, failure.stage, failure.reason) for failure in item.failures}, item.num_updates

    found = failures(make_engine(faulty))
    assert found == failures(vector(faulty().data, LinearTrainer(3)))
    assert (3, "data", "RuntimeError: disk gone") in found[0]
    assert found[1] == 4


def test_what_workers_cannot_do_is_told_with_the_cause(make_engine):
    with pytest.raises(ClusterError, match="building the scenario: FileNotFoundError: no data on this machine"):
        make_engine(broken)
    with pytest.raises(ClusterError, match="other parameters"):
        make_engine(wider)
    lock = threading.Lock()
    stuck = Strategy(select=everyone(), local=LocalRule(correct=lambda grad, w, w_global: lock and grad))
    with pytest.raises(ClusterError, match="the strategy cannot be sent to workers"):
        rounds_of(make_engine(), stuck, rounds=1)


def test_more_than_the_cluster_has_is_refused(make_engine):
    with pytest.raises(SettingError, match=r"num_workers is 99\n.*at most 2, .* 2 CPUs and 1 GPUs\n.*=2"):
        make_engine(num_workers=99)
    with pytest.raises(SettingError, match=r"gpus_per_worker is 2\n.*2 CPUs and 1 GPUs\n.*=0"):
        make_engine(gpus_per_worker=2)
    with pytest.raises(SettingError, match=r"num_workers is 2\n.*at most 1, "):
        make_engine(gpus_per_worker=1)


def on_its_gpu(*, device):
    assert (device, os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda:0", "0")
    return linear()


def test_workers_with_gpus_build_the_scenario_on_the_first_one_that_they_see(make_engine):
    assert make_engine(on_its_gpu, gpus_per_worker=0.5).num_workers == 2
    scenario = linear()
    scenario.trainer.device = "cuda:0"
    with pytest.raises(SettingError, match=r"gpus_per_worker is 0\n.*device=cuda:0\n.*gpus_per_worker=1"):
        engine_module.ray(scenario.data, scenario.trainer, linear)


@pytest.mark.parametrize(
    ("setting", "given"),
    [("num_workers", 0), ("gpus_per_worker", -1), ("gpus_per_worker", 1.5), ("block_size", 0), ("timeout", 0)],
)
def test_a_setting_out_of_range_is_refused_by_name(setting, given):
    scenario = linear()
    with pytest.raises(SettingError, match=f"{setting} is {given}"):
        engine_module.ray(scenario.data, scenario.trainer, linear, **{setting: given})


def test_an_address_where_nobody_answers_is_told_within_seconds(cluster, make_engine, monkeypatch):
    with pytest.raises(SettingError, match="address is other:6379"):
        make_engine(address="other:6379")
    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"no Ray cluster at engine.address=127.0.0.1:1: ConnectionRefusedError"):
        make_engine(address="127.0.0.1:1")
    assert time.monotonic() - began < 60
    with pytest.raises(SettingError, match=r"address is here\n.*host:port"):
        make_engine(address="here")


def test_without_ray_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    scenario = linear()
    with pytest.raises(MissingExtra, match=r"engine=ray.*\n.*fedlearn\[ray\]"):
        engine_module.ray(scenario.data, scenario.trainer, linear)


JOINS = """
import sys
from fedlearn import Scenario, Schedule, Strategy, everyone, federate, start
from fedlearn.engines.ray.engine import ray
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem

def linear():
    return Scenario(name="linear", data=linear_problem(), trainer=LinearTrainer(3), model="linear")

strategy, engine = Strategy(select=everyone()), ray(linear_problem(), LinearTrainer(3), linear, address=sys.argv[1])
state = start(strategy, LinearTrainer(3).init(1), engine, seed=1)
for done in federate(strategy, engine, state, schedule=Schedule(rounds=2), local=LOCAL_SETTINGS):
    pass
engine.close()
print(engine.num_workers, done.state.params_D.tobytes().hex())
"""


def test_a_script_joins_a_running_cluster_and_leaves_it_running(cluster, tmp_path):
    script = tmp_path / "joins.py"
    script.write_text(JOINS)
    address = cluster.get_runtime_context().gcs_address
    argv = [sys.executable, str(script), address]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    num_workers, model = done.stdout.split()
    here = rounds_of(vector(linear_problem(), LinearTrainer(3)), Strategy(select=everyone()), rounds=2)
    assert num_workers == "2"
    assert np.allclose(np.frombuffer(bytes.fromhex(model), np.float32), here[-1].state.params_D, atol=1e-6)
    assert cluster.cluster_resources()["CPU"] == 2


def test_the_command_line_runs_on_a_cluster_of_its_own_and_leaves_no_litter(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("torch")
    words = ["scenario=diabetes", "rounds=2", "report=false"]
    argv = [sys.executable, "-m", "simulations.run", "engine=ray", "engine.num_workers=1", "hydra.run.dir=far", *words]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 worker, up to 10 clients" in done.stdout
    assert not {"(raylet)", "ray.init", "dashboard"} & set(done.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["far"]
    monkeypatch.chdir(tmp_path)
    assert main(["engine=vector", "hydra.run.dir=near", *words]) == 0
    far, near = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("far", "near"))
    assert far["parameters_sha256"] == near["parameters_sha256"]


# partial aggregates, without a cluster


def some_updates(first, last, *, seed=0):
    rng = np.random.default_rng((seed, first))
    num, scale = last - first, 10.0 ** rng.integers(-6, 6, (last - first, 1))
    return Updates(
        clients_K=np.arange(first, last),
        delta_KD=(scale * rng.normal(size=(num, 5))).astype(np.float32),
        num_examples_K=rng.integers(1, 50, num),
        num_steps_K=rng.integers(1, 9, num),
        metrics={"loss": MetricSum(rng.random(num), np.ones(num))},
        extra={"change": rng.normal(size=(num, 5)).astype(np.float32)},
        num_bytes_K=np.full(num, 40),
    )


@pytest.mark.parametrize(
    "aggregate", [mean(), mean(weighting="equal"), median().aggregate], ids=["examples", "equal", "stacked"]
)
def test_folding_apart_and_gathering_is_folding_the_whole(aggregate):
    layout = Layout.from_shapes([("w", (5,))])
    parts = [some_updates(0, 3), Failure(client=3, stage="fit", reason="gone"), some_updates(4, 9), some_updates(9, 10)]
    empty = partial(PartialAggregate, aggregator_state=aggregate.init(layout))
    whole, gathered = empty(), empty()
    for part in parts:
        whole = accumulate(whole, aggregate, part)
    for half in (parts[:2], parts[2:], []):
        current = PartialAggregate(aggregator_state=aggregate.init(layout))
        for part in half:
            current = accumulate(current, aggregate, part)
        gathered = accumulate(gathered, aggregate, current)
    first_D, second_D = (
        aggregate.finish(part.aggregator_state, {}, Context(round=1, seed=1))[0] for part in (gathered, whole)
    )
    assert np.allclose(first_D, second_D, rtol=1e-7, atol=0)
    assert np.allclose(gathered.extra["change"], whole.extra["change"], rtol=1e-12)
    assert np.allclose(gathered.metrics["loss"], whole.metrics["loss"], rtol=1e-12)
    for name in ("failures", "num_updates", "num_examples", "bytes_up"):
        assert getattr(gathered, name) == getattr(whole, name)


def test_compensated_totals_add_as_exactly_as_float64_ones():
    jnp = pytest.importorskip("jax.numpy")
    item, other = some_updates(0, 20).delta_KD, some_updates(20, 40).delta_KD
    exact = divide_total(add_totals(add_rows(None, item, np.ones(20)), add_rows(None, other, np.ones(20))), 40)
    apart = [add_rows(None, jnp.asarray(rows_KD), np.ones(20)) for rows_KD in (item, other)]
    assert np.allclose(divide_total(add_totals(*apart), 40), exact, rtol=1e-6)
    assert np.allclose(divide_total(add_totals(*copy_arrays(apart)), 40), exact, rtol=1e-6)
    assert add_totals(None, apart[0]) is apart[0]


def test_what_a_worker_owns_is_its_own_and_may_be_written_to():
    given = some_updates(0, 2)
    given.delta_KD.flags.writeable = False
    copy = copy_arrays({"blocks": [given], "total": (given.delta_KD, 1.5), "none": None})
    copy["blocks"][0].delta_KD[:] = 0
    copy["total"][0][:] = 0
    assert given.delta_KD.any()
    assert (copy["total"][1], copy["none"]) == (1.5, None)
