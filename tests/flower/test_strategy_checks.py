"""A Flower strategy runs as its algorithm, or is refused with the name of the part that would be left out."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed")
from flwr.app import MetricRecord
from flwr.serverapp import strategy as flower

from fedlearn import LocalSettings, Schedule, SettingError, federate, serial, start
from fedlearn.errors import FedlearnError
from fedlearn.flower.from_flower import from_flower
from fedlearn.testing import LinearTrainer, linear_problem

RUNS = {  # arguments with which a strategy differs from FedAvg
    "FedAvgM": {"server_momentum": 0.9},
    "FedAdam": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.25},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "Bulyan": {"num_malicious_nodes": 0},
    "QFedAvg": {"client_learning_rate": 0.05},
}
REFUSED = {  # arguments, and the part that the error names
    "FedProx": ({"proximal_mu": 10.0}, "proximal-mu"),
    "FedXgbBagging": ({}, "FedXgbBagging"),
    "FedXgbCyclic": ({}, "FedXgbCyclic"),
}
WRAPPERS = [name for name in dir(flower) if name.startswith("DifferentialPrivacy")]
OTHERS = ("FedAvg", "Result", "Strategy")


def train(strategy, rounds=3):
    engine, trainer = serial(linear_problem(), LinearTrainer(3)), LinearTrainer(3)
    state = start(strategy, trainer.init(1), engine, seed=1)
    local = LocalSettings(batch_size=4, learning_rate=0.05)
    *_, last = federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local)
    return np.asarray(last.state.params_D)


@pytest.fixture(scope="module")
def fedavg():
    return train(from_flower(flower.FedAvg()))


def test_each_stock_strategy_has_a_case_here():
    names = [name for name in dir(flower) if name[0].isupper()]
    assert sorted(names) == sorted([*RUNS, *REFUSED, *WRAPPERS, *OTHERS])


@pytest.mark.parametrize("name", RUNS)
def test_a_stock_strategy_is_not_fedavg_under_another_name(name, fedavg):
    found = train(from_flower(getattr(flower, name)(**RUNS[name])))
    assert np.all(np.isfinite(found))
    assert not np.allclose(found, fedavg, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_strategy_that_needs_more_than_our_clients_do_is_refused(name):
    arguments, part = REFUSED[name]
    with pytest.raises(SettingError, match=part):
        from_flower(getattr(flower, name)(**arguments))


def test_fedprox_is_refused_with_the_setting_of_fedlearn():
    with pytest.raises(SettingError, match=r"try       strategy=fedprox strategy\.mu=0\.1"):
        from_flower(flower.FedProx(proximal_mu=1.0))


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_strategy_that_wraps_another_is_refused(name):
    needed = {"noise_multiplier": 1.0, "num_sampled_clients": 2}
    arguments = needed | ({"clipping_norm": 1.0} if "Fixed" in name else {"clipped_count_stddev": 1.0})
    with pytest.raises(SettingError, match="wraps"):
        from_flower(getattr(flower, name)(flower.FedAvg(), **arguments))


class Rate(flower.FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = 0.1 / server_round
        return super().configure_train(server_round, arrays, config, grid)


class Metrics(flower.FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        for message in super().configure_train(server_round, arrays, config, grid):
            message.content["hints"] = MetricRecord({"clip": 1.0})
            yield message


class Start(flower.FedAvg):
    def start(self, *args, **kwargs):
        return super().start(*args, **kwargs)


class Evaluates(flower.FedAvg):
    def aggregate_evaluate(self, server_round, replies):
        return None


class Inherited(Evaluates):
    pass


CUSTOM = {
    "configuration": (Rate(), r"lr=0\.1(.|\n)*local\.learning_rate"),
    "metrics": (Metrics(), "clip="),
    "loop": (Start(), "its own start"),
    "evaluation": (Evaluates(), "its own aggregate_evaluate"),
    "inherited evaluation": (Inherited(), "its own aggregate_evaluate"),
    "share of evaluation": (flower.FedAvg(fraction_evaluate=0.5), "evaluate_clients"),
    "function": (flower.FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord()), "train_metrics_aggr_fn"),
}


@pytest.mark.parametrize("kind", CUSTOM)
def test_a_part_that_would_be_left_out_is_refused_by_name(kind):
    strategy, text = CUSTOM[kind]
    with pytest.raises(SettingError, match=text):
        from_flower(strategy)


def test_a_configuration_of_a_later_round_ends_the_run():
    class Later(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            if server_round == 2:
                config["epochs"] = 5
            return super().configure_train(server_round, arrays, config, grid)

    with pytest.raises(SettingError, match="epochs=5"):
        train(from_flower(Later()))


def test_a_strategy_that_needs_another_metric_is_explained():
    class Norm(flower.FedAvg):
        def aggregate_train(self, server_round, replies):
            return None, MetricRecord({"norm": [reply.content["metrics"]["grad-norm"] for reply in replies]})

    with pytest.raises(FedlearnError, match=r"Norm cannot aggregate(.|\n)*grad-norm(.|\n)*num-examples and train_loss"):
        train(from_flower(Norm()))
