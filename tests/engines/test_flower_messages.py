"""Requests and results of Flower's simulation are equal after serialization, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed")
pytest.importorskip("ray", reason="ray is not installed")

from fedlearn import LocalSettings, Updates
from fedlearn.core import Failure, Predictions, Request
from fedlearn.core.records import ExampleDP, MetricSum
from fedlearn.engines.flower import (
    pack_request,
    pack_result,
    unpack_request,
    unpack_result,
)

RNG = np.random.default_rng(0)


def vector(size=5):
    return RNG.normal(size=size).astype(np.float32)


@pytest.mark.parametrize("example_dp", [None, ExampleDP(clip=0.1, noise_multiplier=1.1)])
def test_an_order_and_a_memory(example_dp):
    local = LocalSettings(steps=3, learning_rate=0.1, example_dp=example_dp)
    order = Request(round=3, seed=7, params_D=vector(), broadcast={"control": vector()}, local=local)
    memory = {"own": vector(), "0.residual": vector()}
    found, remembered = unpack_request(pack_request(order, memory))
    assert (found.round, found.seed, found.local, found.deployed) == (3, 7, local, False)
    assert np.array_equal(found.params_D, order.params_D)
    assert np.array_equal(found.broadcast["control"], order.broadcast["control"])
    assert remembered.keys() == memory.keys()
    assert all(np.array_equal(remembered[name], memory[name]) for name in memory)


def test_an_update_with_all_that_comes_along():
    update = Updates(
        clients_K=np.array([4]),
        delta_KD=vector()[None],
        num_examples_K=np.array([9]),
        num_steps_K=np.array([2]),
        metrics={"loss": MetricSum(np.array([1 / 3]), np.array([9]))},
        client_state={"own": vector()[None]},
        extra={"change": vector()[None]},
        num_bytes_K=np.array([40]),
    )
    found = unpack_result(pack_result(update), 4)
    for name in ("clients_K", "delta_KD", "num_examples_K", "num_steps_K", "num_bytes_K"):
        assert np.array_equal(getattr(found, name), getattr(update, name))
        assert getattr(found, name).dtype == getattr(update, name).dtype
    assert found.metrics["loss"].total_K == 1 / 3
    assert np.array_equal(found.client_state["own"], update.client_state["own"])
    assert np.array_equal(found.extra["change"], update.extra["change"])


def test_a_failure_predictions_and_nothing():
    failure = Failure(client=2, stage="fit", reason="disk gone", traceback="line 1\nline 2")
    assert unpack_result(pack_result(failure), 2) == failure
    predictions = Predictions(client=1, outputs=vector(6).reshape(3, 2), targets=np.array([0, 1, 1]))
    found = unpack_result(pack_result(predictions), 1)
    assert np.array_equal(found.outputs, predictions.outputs)
    assert np.array_equal(found.targets, predictions.targets)
    assert unpack_result(pack_result(None), 1) is None
