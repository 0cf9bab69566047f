"""Flower strategies run in the training loop of fedlearn, and strategies of fedlearn in Flower apps."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed")
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as flower

import strategies
from fedlearn import (
    CompositionError,
    LocalSettings,
    Schedule,
    SettingError,
    Stage,
    Strategy,
    clip,
    everyone,
    federate,
    serial,
    start,
    vector,
)
from fedlearn.algorithm.transforms import Transform
from fedlearn.core import checkpoint
from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.errors import CheckpointError, FedlearnError
from fedlearn.flower.from_flower import from_flower
from fedlearn.flower.in_process_grid import InProcessGrid
from fedlearn.flower.to_flower import to_flower
from fedlearn.testing import LinearTrainer, check_strategy, linear_problem

LOCAL = LocalSettings(batch_size=4, learning_rate=0.05)
STOCK = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9},
    "FedAdam": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_nodes_to_select": 2},
    "QFedAvg": {"client_learning_rate": 0.05},
}


def rounds_of(strategy, *, rounds=4, engine=None, state=None):
    engine = engine or serial(linear_problem(), LinearTrainer(3))
    state = state or start(strategy, LinearTrainer(3).init(1), engine, seed=1)
    return list(federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=LOCAL))


def params_of(rounds):
    return np.asarray(rounds[-1].state.params_D)


# strategies of Flower in the training loop of fedlearn


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_strategy_of_flowers_keeps_the_contract_of_ours(name):
    check_strategy(from_flower(getattr(flower, name)(**STOCK[name])))


def test_what_flower_collects_a_client_is_what_is_new_and_nothing_stays_uncollected():
    frozen = []

    class Watched(flower.QFedAvg):
        def aggregate_train(self, server_round, replies):
            frozen.append(gc.get_freeze_count())
            return super().aggregate_train(server_round, replies)

    rounds_of(from_flower(Watched(client_learning_rate=0.05)), rounds=2)
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (flower.FedAvg(), strategies.fedavg()),
        (flower.FedAvgM(server_momentum=0.9), strategies.fedavgm(momentum=0.9)),
        (flower.FedMedian(), strategies.fedmedian()),
        (flower.FedTrimmedAvg(beta=0.2), strategies.fedtrimmedavg(trim=0.2)),
        (flower.Krum(num_malicious_nodes=1), strategies.krum(num_malicious=1)),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_flowers_and_ours_end_alike_in_our_simulator(theirs, ours):
    engine = vector(linear_problem(), LinearTrainer(3))
    assert np.allclose(params_of(rounds_of(from_flower(theirs), engine=engine)), params_of(rounds_of(ours)), atol=2e-6)


def test_bulyan_keeps_the_model_where_flowers_skips_a_round_for_lack_of_replies(caplog):
    few = from_flower(flower.Bulyan(num_malicious_nodes=1))  # needs 7 responses, but there are 6 clients
    with caplog.at_level(logging.WARNING):
        rounds = rounds_of(few, rounds=1)
    assert np.array_equal(params_of(rounds), LinearTrainer(3).init(1))
    assert "Bulyan did not change the model" in caplog.text


def test_the_cohort_is_as_large_as_flowers_settings_say():
    assert {len(item.cohort) for item in rounds_of(from_flower(flower.FedAvg(fraction_train=0.5)))} == {3}
    assert {len(item.cohort) for item in rounds_of(from_flower(flower.FedAvg(fraction_train=0.1)))} == {2}
    cohorts = [item.cohort for item in rounds_of(from_flower(flower.FedAvg(fraction_train=0.1, min_train_nodes=1)))]
    assert cohorts == [
        item.cohort for item in rounds_of(from_flower(flower.FedAvg(fraction_train=0.1, min_train_nodes=1)))
    ]
    with pytest.raises(SettingError, match="min_available_nodes is 7"):
        rounds_of(from_flower(flower.FedAvg(min_available_nodes=7)))


def test_what_a_strategy_remembers_lies_in_checkpoints_under_its_names(tmp_path):
    strategy, trainer = from_flower(flower.FedAdam()), LinearTrainer(3)
    state = rounds_of(strategy, rounds=2)[-1].state
    assert {"m_t/out.bias", "m_t/out.weight", "v_t/out.bias", "v_t/out.weight"} <= set(state.aggregate)
    path = checkpoint.save(tmp_path, state, {}, layout=trainer.layout)
    loaded, _ = checkpoint.load(path, trainer.layout)
    resumed = rounds_of(from_flower(flower.FedAdam()), state=loaded)
    assert np.array_equal(params_of(resumed), params_of(rounds_of(strategy)))


class UserStrategy(flower.FedAvg):
    """A user's strategy: its steps depend on its history, and it selects clients with even ids only."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.history, self.best, self.asked = [], None, {}

    def configure_train(self, server_round, arrays, config, grid):
        messages = [
            item
            for item in super().configure_train(server_round, arrays, config, grid)
            if item.metadata.dst_node_id % 2
        ]
        self.asked[str(server_round)] = [item.metadata.dst_node_id for item in messages]
        return messages

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.history.append(float(metrics["train_loss"]))
        self.best = ArrayRecord({name: Array(array.numpy() / len(self.history)) for name, array in arrays.items()})
        return self.best, metrics


def test_a_strategy_of_the_users_own_keeps_its_records_lists_and_numbers():
    strategy = UserStrategy()
    check_strategy(from_flower(strategy))
    assert strategy.history == []
    whole = rounds_of(from_flower(strategy))
    half = rounds_of(from_flower(UserStrategy()), rounds=2)[-1].state
    assert np.array_equal(params_of(rounds_of(from_flower(UserStrategy()), state=half)), params_of(whole))


class Counter:
    def __init__(self, count):
        self.count = count


class Opaque(flower.FedAvg):
    """A strategy whose state is not an array."""

    def __init__(self):
        super().__init__()
        self.counter = Counter(0)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.counter = Counter(self.counter.count + 1)
        assert self.counter.count == server_round
        return arrays, metrics


def test_a_run_whose_strategy_keeps_what_no_checkpoint_holds_goes_on_but_refuses_to_be_resumed():
    rounds = rounds_of(from_flower(Opaque()))
    assert rounds[-1].number == 4
    with pytest.raises(CheckpointError, match="Opaque cannot be resumed: its attributes counter are in no checkpoint"):
        rounds_of(from_flower(Opaque()), state=rounds[1].state)


def test_a_strategy_that_sends_other_arrays_than_the_model_is_refused():
    class Scaled(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            other = ArrayRecord({name: Array(array.numpy() * 2) for name, array in arrays.items()})
            return super().configure_train(server_round, other, config, grid)

    with pytest.raises(FedlearnError, match="Scaled sends clients other arrays"):
        rounds_of(from_flower(Scaled()))


def test_what_is_no_strategy_of_flowers_is_refused():
    with pytest.raises(SettingError, match="flower is Strategy"):
        from_flower(strategies.fedavg())
    wrapped = flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAdam(), 1.0, 1.0, 2)
    with pytest.raises(SettingError, match=r"flower is DifferentialPrivacy(.|\n)*wraps no other one"):
        from_flower(wrapped)


def test_a_failing_client_is_left_out_and_named():
    problem = linear_problem()

    def train(client):
        if client == 2:
            raise OSError("disk gone")
        return problem.train(client)

    engine = serial(replace(problem, train=train), LinearTrainer(3))
    done = rounds_of(from_flower(flower.FedAvg()), rounds=1, engine=engine)[0]
    assert [(failure.client, failure.stage) for failure in done.failures] == [(2, "data")]


# strategies of fedlearn in Flower apps


@pytest.fixture
def client():
    app = ClientApp()

    @app.train()
    def train(message, context):
        k, fails = context.node_config["partition-id"], context.run_config.get("fails", "")
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        if k == 1 and fails == "raises":
            raise OSError("disk gone")
        value = float("nan") if k == 1 and fails == "nan" else k + 1
        current = {
            name: (array + value).astype(array.dtype) for name, array in arrays.items() if array.dtype.kind == "f"
        }
        if k == 1 and fails == "shape":
            current = {name: array[:1] for name, array in current.items()}
        current |= {name: array for name, array in arrays.items() if array.dtype.kind != "f"}
        count = 0 if k == 1 and fails == "empty" else 10
        record = ArrayRecord({name: Array(current[name]) for name in arrays})
        metrics = MetricRecord({"num-examples": count, "loss": float(k)})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": 0.5})}), reply_to=message)

    return app


def run_in_server_app(strategy, client, start, *, num_nodes=4, rounds=2, **run_config):
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context):
        results.append(strategy.start(grid, start, num_rounds=rounds))

    grid = InProcessGrid(client, num_nodes, run_config=run_config)
    server(grid=grid, context=Context(1, 0, {}, RecordDict(), run_config))
    return results[0], grid


def zeros(dtype=np.float32):
    return ArrayRecord({"w": Array(np.zeros((2, 2), dtype)), "b": Array(np.zeros(3, dtype))})


def test_one_of_ours_runs_in_a_server_app_with_its_evaluation(client):
    result, grid = run_in_server_app(to_flower(strategies.fedavg()), client, zeros())
    assert result.arrays["w"].numpy().tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert list(result.arrays) == ["w", "b"]
    assert result.train_metrics_clientapp[1]["loss"] == 1.5
    assert result.evaluate_metrics_clientapp[2] == {"accuracy": 0.5}
    assert grid.outcomes == {"response": 16}


def test_arrays_keep_names_order_and_dtypes(client):
    start = ArrayRecord({"z": Array(np.zeros(2)), "a": Array(np.zeros(1, np.float16)), "n": Array(np.array([7]))})
    result, _ = run_in_server_app(to_flower(strategies.fedavg()), client, start, rounds=1)
    assert {name: array.dtype for name, array in result.arrays.items()} == {
        "z": "float64",
        "a": "float16",
        "n": "int64",
    }
    assert list(result.arrays) == ["z", "a", "n"]
    assert result.arrays["n"].numpy().tolist() == [7]
    assert result.arrays["z"].numpy().tolist() == [2.5, 2.5]


def test_the_cohort_is_what_our_strategy_selects(client):
    _, grid = run_in_server_app(
        to_flower(strategies.fedadam(clients_per_round=2), fraction_evaluate=0.0), client, zeros(), rounds=3
    )
    assert grid.outcomes == {"response": 6}


@pytest.mark.parametrize("fails", ["raises", "nan", "shape", "empty"])
def test_a_bad_reply_is_logged_and_never_touches_the_model(client, fails, caplog):
    with caplog.at_level(logging.WARNING):
        result, _ = run_in_server_app(to_flower(strategies.fedavg()), client, zeros(), rounds=1, fails=fails)
    assert result.arrays["b"].numpy().tolist() == [pytest.approx(8 / 3)] * 3
    assert "node 3 is left out" in caplog.text


def test_too_few_nodes_end_the_wait_by_name(client):
    strategy = to_flower(strategies.fedavg(), min_available_nodes=9, timeout_s=0.3)
    with pytest.raises(FedlearnError, match=r"4 nodes are connected after 0.3 s\n  expected  min_available_nodes=9"):
        strategy.configure_train(1, zeros(), ConfigRecord(), InProcessGrid(client, 4))


def test_work_at_clients_cannot_travel_and_is_refused():
    with pytest.raises(CompositionError, match="changes local training"):
        to_flower(strategies.fedprox())
    with pytest.raises(CompositionError, match="stage 0 of the strategy has a client half"):
        to_flower(strategies.signsgd())
    with pytest.raises(CompositionError, match="stage 0 of the strategy has a client half"):
        to_flower(Strategy(select=everyone(), stages=(clip(1.0),)))
    promise = PrivacyGuarantee(
        kind="test",
        unit="client",
        adjacency="one client more or less",
        charge=lambda ledger, release: ledger,
        epsilon_of=lambda ledger: None,
    )
    with pytest.raises(CompositionError, match="the strategy claims privacy"):
        to_flower(replace(strategies.fedavg(), privacy_guarantee=promise))
    with pytest.raises(SettingError, match="fraction_train is"):
        to_flower(strategies.fedavg(), fraction_train=0.5)


def test_a_stage_that_works_on_the_server_only_may_come_along(client):
    halved = Stage(server=Transform(update=lambda update_D, memory, context: (update_D / 2, memory)))
    result, _ = run_in_server_app(to_flower(Strategy(select=everyone(), stages=(halved,))), client, zeros(), rounds=1)
    assert result.arrays["b"].numpy().tolist() == [1.25] * 3


def test_there_and_back_again_is_the_strategy_itself():
    ours = strategies.fedadam(learning_rate=0.05)
    assert np.allclose(params_of(rounds_of(from_flower(to_flower(ours)))), params_of(rounds_of(ours)), atol=1e-6)
