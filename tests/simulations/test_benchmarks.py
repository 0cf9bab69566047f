from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from needs import needs

from fedlearn import Examples, SettingError, federate, start, vector
from fedlearn.algorithm import plain_training
from fedlearn.core import Request, ServerState
from fedlearn.core.records import ClientWork
from fedlearn.errors import FedlearnError
from fedlearn.loop.schedule import Schedule
from fedlearn.testing import check_twins
from fedlearn.trainers.batching import batch_plans
from simulations.benchmarks import bare, child, measure, speed, synthetic, tables
from simulations.benchmarks.measure import Run
from simulations.benchmarks.ours import trainer
from simulations.benchmarks.settings import Settings, read
from simulations.benchmarks.synthetic import (
    cohort_of,
    examples_of,
    federated_data,
    poisson_batches,
    pool_of,
    shuffled,
)
from simulations.benchmarks.workloads import SEED, W1, W2, W3, W4, W5, WORKLOADS, workload
from strategies import fedavg

needs("torch")

TINY = {"w1": {"clients": 6, "cohort": 3, "examples": 70}, "w3": {"clients": 30, "cohort": 28, "examples": 20}}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """Use a few megabytes of examples instead of 192 MiB."""
    monkeypatch.setattr(synthetic, "POOL_BYTES", 4 * 2**20)
    pool_of.cache_clear()
    yield
    pool_of.cache_clear()


# workloads


@pytest.mark.parametrize(
    ("work", "num_parameters"), [(W1, 109_386), (W2, 1_206_590), (W3, 1_001), (W5, 1_626_442)], ids=str
)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_model_has_the_published_number_of_parameters(work, num_parameters, framework):
    pytest.importorskip(framework)
    assert trainer(work, framework).layout.num_parameters == num_parameters


@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS)
def test_examples_have_the_shape_that_is_said_and_the_same_values_each_time(work):
    work = replace(work, num_clients=50, cohort_size=10)
    item = examples_of(work, 7)
    assert item.x.shape == (work.size(7), *work.input_shape)
    assert item.x.dtype == np.float32
    assert item.y.dtype == np.int64
    assert set(np.unique(pool_of(work).y)) <= set(range(work.num_classes))
    before = item.x.copy()
    pool_of.cache_clear()
    assert np.array_equal(before, examples_of(work, 7).x)


def test_clients_of_w1_share_nothing(monkeypatch):
    monkeypatch.setattr(synthetic, "POOL_BYTES", 192 * 2**20)
    assert len(pool_of(W1)) == 60_000
    assert list(map(synthetic.first_rows(W1), range(100))) == list(range(0, 60_000, 600))


def test_sizes_of_w2_are_uneven_with_mean_about_100_and_depend_on_the_client_alone():
    sizes = [W2.size(client) for client in range(1000)]
    assert sizes == [replace(W2, num_clients=7, cohort_size=3).size(client) for client in range(1000)]
    assert 95 < np.mean(sizes) < 105
    assert 40 < np.std(sizes) < 70
    assert min(sizes) >= 10
    assert max(sizes) <= W2.largest
    assert all(len(examples_of(W2, client)) == sizes[client] for client in range(0, 1000, 50))


def test_a_million_clients_cost_what_a_few_cost():
    began = time.process_time()
    work = workload("w3", clients=1_000_000, cohort=5_000)
    data = federated_data(work)
    cohort_K = cohort_of(work, 1)
    orders = shuffled(work, 1, cohort_K)
    assert len(data.train(999_999)) == 20
    assert data.train(999_999).x.base is not None
    assert time.process_time() - began < 2
    assert len(set(cohort_K.tolist())) == len(orders) == 5_000
    assert cohort_K.max() > 900_000


def test_cohorts_and_orders_are_drawn_anew_each_round():
    assert np.array_equal(cohort_of(W2, 1), cohort_of(W2, 1))
    assert not np.array_equal(cohort_of(W2, 1), cohort_of(W2, 2))
    for work in (W1, W2):
        cohort_K = cohort_of(work, 1)
        for client, order_N in zip(cohort_K.tolist(), shuffled(work, 1, cohort_K), strict=True):
            assert sorted(order_N.tolist()) == list(range(work.size(client)))


# equal models in all systems


@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS)
def test_the_twins_are_one_model(work):
    pytest.importorskip("flax")
    small = replace(work, dropout=False, input_shape=(11, 10, work.input_shape[-1]) if work.model == "cnn" else (30,))
    rng = np.random.default_rng(0)
    examples = []
    for size in (9, 20):
        x = rng.normal(size=(size, *small.input_shape)).astype(np.float32)
        examples.append(Examples(x, rng.integers(0, small.num_classes, size)))
    check_twins(trainer(small, "torch"), trainer(small, "jax"), examples)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_dropout_is_on_in_training_only(framework):
    pytest.importorskip(framework)
    small = replace(W2, input_shape=(8, 8, 1))
    updates, outputs = [], []
    for work in (small, replace(small, dropout=False)):
        item = trainer(work, framework)
        order = Request(round=1, seed=1, params_D=item.init(1), local=work.local)
        updates.append(
            np.asarray(item.fit(order, plain_training, [ClientWork(client=0, examples=examples_of(small, 0))]).delta_KD)
        )
        outputs.append(item.predict(item.init(1), examples_of(small, 0).x))
    assert not np.allclose(*updates, atol=1e-4)
    assert np.array_equal(*outputs)


# equal work in all systems


def as_ours(work, round, cohort_K):
    """Return the batches that fedlearn draws."""
    order = Request(round=round, seed=SEED, params_D=np.zeros(1), local=work.local)
    plans_KSB, _ = batch_plans(order, cohort_K, np.array([work.size(client) for client in cohort_K.tolist()]))
    return [plan_SB[plan_SB >= 0] for plan_SB in plans_KSB]


def test_the_bare_programs_of_w4_clip_as_our_trainers_do(monkeypatch):
    pytest.importorskip("flax")
    quiet = replace(W4, example_dp=replace(W4.example_dp, clip=0.3, noise_multiplier=0.0), num_clients=3, cohort_size=2)
    cohort_K = np.array([0, 2])
    params_D = trainer(quiet, "torch").init(SEED) * 3
    orders = shuffled(quiet, 1, cohort_K)
    plans = [poisson_batches(quiet, *item) for item in zip(cohort_K.tolist(), orders, strict=True)]
    plan_KSB = np.full((2, len(plans[0]), max(len(batch) for plan in plans for batch in plan)), -1, np.int32)
    for k, plan in enumerate(plans):
        for s, batch in enumerate(plan):
            plan_KSB[k, s, : len(batch)] = batch
    work = [ClientWork(client=client, examples=examples_of(quiet, client)) for client in cohort_K.tolist()]
    for framework in ("torch", "jax"):
        program = import_module(f"simulations.benchmarks.bare_{framework}").Bare(quiet, workers=1)
        bare_D, _ = bare.run_round(program, quiet, params_D, round=1, cohort_K=cohort_K)
        program.close()
        module = import_module(f"fedlearn.trainers.{framework}.trainer")
        monkeypatch.setattr(module, "poisson_plans", lambda *asked: (plan_KSB, np.full(2, len(plans[0]))))
        asked = Request(round=1, seed=SEED, params_D=params_D, local=quiet.local)
        ours_KD = np.asarray(trainer(quiet, framework).fit(asked, plain_training, work).delta_KD)
        assert np.abs(ours_KD).max() > 1e-3
        assert np.abs(params_D + ours_KD.mean(axis=0) - bare_D).max() < 1e-6


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", ["w1", "w3"])
def test_bare_and_ours_end_at_the_same_model_on_the_same_batches(name, framework):
    pytest.importorskip(framework)
    module = __import__(f"simulations.benchmarks.bare_{framework}", fromlist=["Bare"])
    work = workload(name, **TINY[name])
    program = module.Bare(work, workers=1)
    fitted, strategy = trainer(work, framework), fedavg(clients_per_round=work.cohort_size)
    engine = vector(federated_data(work), fitted, batching="map")
    assert program.layout == fitted.layout
    state: ServerState = start(strategy, fitted.init(SEED), engine, seed=SEED)
    (done,) = federate(strategy, engine, state, schedule=Schedule(rounds=1), local=work.local)
    args = {"round": 1, "cohort_K": np.array(done.cohort), "orders": as_ours}
    new_D, num_examples = bare.run_round(program, work, fitted.init(SEED), **args)
    moved = np.abs(np.asarray(done.state.params_D) - fitted.init(SEED)).max()
    assert moved > 1e-3
    np.testing.assert_allclose(new_D, np.asarray(done.state.params_D), atol=1e-4 * moved)
    assert num_examples == done.num_examples


def test_uneven_clients_are_weighed_alike_by_both_bare_programs():
    pytest.importorskip("flax")
    from simulations.benchmarks import bare_jax, bare_torch

    work = replace(W2, input_shape=(8, 8, 1), dropout=False, num_clients=20, cohort_size=5)
    programs = [bare_torch.Bare(work, workers=1), bare_jax.Bare(work, workers=1)]
    params_D = trainer(work, "torch").init(1)
    news = [bare.run_round(program, work, params_D, round=1)[0] for program in programs]
    assert np.abs(news[0] - params_D).max() > 1e-3
    np.testing.assert_allclose(*news, atol=1e-5)


SPLIT = """
import numpy as np
from simulations.benchmarks.processes import Processes

prepare = lambda: lambda params_D, share: sum(len(order_N) * (params_D + client) for client, order_N in share)
team = Processes(prepare, num_parameters=4, count=3)
share = [(client, np.zeros(client + 1)) for client in range(7)]
print([team.fit(np.full(4, value, np.float32), share).tolist() for value in (0.5, 1.5)])
team.close()
"""


def test_processes_share_a_cohort_and_give_its_weighted_mean():
    # not in this process: JAX may have started threads, and a fork would lose them
    done = subprocess.run([sys.executable, "-c", SPLIT], capture_output=True, text=True, timeout=120, check=True)
    mean = sum(k * (k + 1) for k in range(7)) / 28
    np.testing.assert_allclose(json.loads(done.stdout), [[0.5 + mean] * 4, [1.5 + mean] * 4], rtol=1e-6)


# the command


def run(*words):
    command = [sys.executable, "-m", "simulations.benchmarks.speed", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_comparison_leaves_a_table_ratios_json_markdown_and_a_figure(tmp_path):
    pytest.importorskip("flax")
    words = ["workload=w3", "clients=20", "cohort=4", "rounds=2", "repeats=2", "slow_rounds=1", f"out={tmp_path}"]
    done = run(*words, "systems=ours,bare")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(r["repeat"], r["framework"], r["system"], r["error"]) for r in result["runs"]] == [
        (repeat, framework, system, "")
        for repeat in (1, 2)
        for framework, system in [("torch", "ours"), ("torch", "bare"), ("jax", "ours"), ("jax", "bare")][
            :: 1 if repeat == 1 else -1
        ]
    ]
    for item in result["runs"]:
        assert item["examples"] == [80, 80]
        assert len(item["seconds"]) == 2
        assert item["seconds_to_first_round"] > item["seconds"][0]
        assert 50 < item["memory_mib"] < 5000
        assert 0.3 < item["loss"] < 1.0
    assert {r["ours_over"] for r in result["ratios"]} == {"bare"}
    assert "ours / bare" in done.stdout
    assert "| torch | ours |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "rounds.png").stat().st_size > 5000


def test_results_have_a_folder_of_their_own_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        speed, "run_all", lambda settings: [Run(framework="torch", system="ours", repeat=1, error="no")]
    )
    assert [speed.main(["workload=w1"]) for _ in range(2)] == [3, 3]
    assert len(list((tmp_path / "outputs" / "benchmarks" / "w1").iterdir())) == 2


def test_help_names_every_word(capsys):
    assert speed.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("workload=", "framework=", "systems=", "repeats=", "rounds=", "slow_rounds=", "limit=", "out="):
        assert word in shown


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("workloads=w1", "try       workload=w1"),
        ("workload=w9", "one of w1, w2, w3, w4, w5"),
        ("repeat=3", "try       repeats=3"),
        ("framework=troch", "try       framework=torch"),
        ("systems=ours,flwr", "try       systems=flower"),
        ("rounds=0", "a whole number >= 1"),
        ("rounds=many", "a whole number >= 1"),
        ("cohort=101", "at most 100, the number of clients"),
        ("clients", "clients=VALUE"),
        ("hurry", "expected  workload"),
    ],
)
def test_a_bad_word_is_answered_with_what_was_meant(word, said, capsys):
    assert speed.main([word]) == 2
    assert said in capsys.readouterr().err


def test_sizes_of_ones_own_reach_the_workload():
    settings = read(["workload=w3", "clients=1000000", "cohort=5000", "rounds=7", "limit=9", "framework=jax"])
    assert str(settings.workload).startswith(
        "w3: logistic regression, 1,000 features, 1,000,000 clients of 20 examples"
    )
    assert (settings.workload.cohort_size, settings.limit, settings.frameworks) == (5000, 9, ("jax",))
    assert (settings.rounds("ours"), settings.rounds("flower")) == (7, 3)
    with pytest.raises(SettingError):
        workload("w1", cohort=0)


# errors become rows with their reason


@pytest.mark.parametrize(("system", "package"), [("flower", "flwr"), ("pfl", "pfl")])
def test_a_system_that_is_not_installed_says_how_to_install_it(system, package, monkeypatch):
    # modules that other tests have imported
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"simulations.benchmarks.{system}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    task = {"system": system, "framework": "torch", "began": 0.0, "workload": {"name": "w1"}}
    assert child.outcome(task)["error"].startswith(f"{package} is not installed: pip install '{package}")


def test_pfl_has_no_jax():
    with pytest.raises(FedlearnError, match="no JAX"):
        child.system("pfl", "jax")


def test_what_takes_too_long_is_given_up(monkeypatch):
    settings = Settings(workload=W1, sizes={}, limit=1)
    monkeypatch.setattr(measure, "environment", lambda *args: {**os.environ, "PYTHONSTARTUP": ""})
    began = time.perf_counter()
    run = measure.run_system(settings, "torch", "bare", repeat=1)
    assert run.error == "not done after 1 s (limit=1)"
    assert time.perf_counter() - began < 120


def test_a_process_that_dies_leaves_its_last_words(monkeypatch):
    monkeypatch.setattr(measure.sys, "executable", "/bin/false")
    run = measure.run_system(Settings(workload=W1, sizes={}), "torch", "bare", repeat=1)
    assert run.error.startswith("ended with exit code 1")


def some(system, repeat, seconds, **more):
    count = 1 + len(seconds)
    first = {"seconds": [9.0, *seconds], "examples": [100] * count, "processor": [2.0] * count, "variant": "so"}
    return Run(framework="torch", system=system, repeat=repeat, **first, **more)


def test_ratios_are_taken_within_a_repeat_and_the_first_round_stands_apart():
    runs = [some("ours", 1, [1, 3, 2]), some("bare", 1, [1, 1, 1]), some("ours", 2, [8]), some("bare", 2, [2])]
    runs += [
        some("ours", 3, [3]),
        some("bare", 3, [1]),
        Run(framework="torch", system="flower", repeat=1, error="no\nx"),
    ]
    (ratio,) = tables.ratios(runs)
    assert ratio.values == (2.0, 4.0, 3.0)
    assert str(ratio) == "torch: ours / bare 3 (2-4; best 1); processor time 1"
    table = tables.rows(runs, W1)
    assert table[0][2:8] == ("3", "1", "2", "0.333", "3", "33")
    assert table[0][8] == "9"
    assert table[2] == ("torch", "flower", "no")
    assert "torch flower" not in "".join(tables.variants(runs))


@pytest.mark.slow
def test_flower_does_the_same_work():
    pytest.importorskip("flwr.simulation")
    pytest.importorskip("ray")
    work = {"name": "w1", "clients": 4, "cohort": 2, "examples": 64, "rounds": 2}
    settings = Settings(workload=workload(**work), sizes={k: v for k, v in work.items() if k != "name"}, limit=240)
    run = measure.run_system(settings, "torch", "flower", repeat=1)
    assert not run.error
    assert run.examples == [128, 128]


def test_pfl_does_the_same_work():
    pytest.importorskip("pfl")
    sizes = {"clients": 4, "cohort": 2, "examples": 64, "rounds": 2}
    run = measure.run_system(Settings(workload=workload("w1", **sizes), sizes=sizes), "torch", "pfl", repeat=1)
    assert not run.error
    assert run.examples == [128, 128]


@pytest.mark.parametrize("name", ["deployment", "large_messages"])
@pytest.mark.parametrize("word", ["mb=3", "mib=0", "mib=1.5", "word"])
def test_a_benchmark_of_a_federation_refuses_a_wrong_setting(name, word, capsys):
    from importlib import import_module

    assert import_module(f"simulations.benchmarks.{name}").main([word]) == 2
    assert word.partition("=")[0] in capsys.readouterr().err
