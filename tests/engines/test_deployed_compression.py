"""Updates reach the coordinator as the bytes that their codec wrote."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import LocalSettings, Schedule, federate, serial, start
from fedlearn.runner.instantiation import build

pytest.importorskip("flwr")

from fedlearn.algorithm.strategy import with_compression
from fedlearn.core.serialization import pack, unpack
from fedlearn.deploy.coordinator_side.remote_scenario import remote_scenario

LOCAL = LocalSettings(batch_size=4, learning_rate=0.05)
TOPK = {"name": "topk", "share": 0.5}


def strategy_of(built):
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    words = built.settings.get("compress")
    return with_compression(strategy, build(words, "compress")) if words else strategy


def run(built, engine, rounds=3):
    strategy = strategy_of(built)
    scenario = build(built.settings["scenario"], "scenario", allow=built.allow)
    state = start(strategy, scenario.trainer.init(1), engine, seed=1)
    return list(federate(strategy, engine, state, schedule=Schedule(rounds=rounds, max_failures=0.6), local=LOCAL))


def deployed(built, rounds=3):
    remote_scenario(built.engine)
    return run(built, built.engine, rounds)


def simulated(built, rounds=3):
    scenario = build(built.settings["scenario"], "scenario", allow=built.allow)
    return run(built, serial(scenario.data, scenario.trainer), rounds)


@pytest.mark.parametrize(
    "compress",
    [TOPK, {"name": "qsgd"}, {"name": "eden"}],
    ids=["topk", "qsgd", "eden"],
)
def test_a_deployed_run_with_compression_is_the_simulated_one_bytes_included(federation, compress):
    built = federation(words={"compress": compress})
    there, here = deployed(built), simulated(built)
    assert np.array_equal(there[-1].state.params_D, here[-1].state.params_D)
    assert [done.bytes_up for done in there] == [done.bytes_up for done in here]


def test_the_majority_vote_travels_in_one_bit_a_parameter(federation):
    built = federation(strategy="signsgd", policy={"strategies": {"signsgd": {}}})
    assert np.array_equal(deployed(built)[-1].state.params_D, simulated(built)[-1].state.params_D)
    assert deployed(built)[-1].bytes_up == 4 * 1  # four clients, four parameters


def test_what_a_node_answers_holds_the_payload_and_no_update(federation):
    built, seen = federation(words={"compress": TOPK}), []

    def noting(payload):
        seen.append(unpack(built.sites[101].respond_to_bytes(payload)))
        return pack(seen[-1])

    built.grid.nodes[101] = noting
    deployed(built, rounds=1)
    (parcel,) = (parcel for parcel in seen if parcel.metadata["kind"] == "fit")
    assert "delta" not in parcel.arrays
    assert parcel.arrays["payload"].nbytes == parcel.arrays["payload_length"].sum()


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (lambda arrays: {**arrays, "payload": arrays["payload"][:-1]}, "response"),
        (lambda arrays: {**arrays, "payload_length": -arrays["payload_length"]}, "response"),
        (lambda arrays: {name: v for name, v in arrays.items() if name != "payload"}, "response"),
        (lambda arrays: {**arrays, "payload_length": arrays["payload_length"] + np.array([-1, 1])}, "update"),
        (lambda arrays: {**arrays, "payload": np.full_like(arrays["payload"], 255)}, "update"),
    ],
    ids=["cut", "negative", "missing", "shifted", "not finite"],
)
def test_a_payload_that_cannot_be_read_never_touches_the_model(federation, change, stage):
    built = federation(words={"compress": TOPK})

    def answer(payload):
        parcel = unpack(built.sites[101].respond_to_bytes(payload))
        fit = parcel.metadata["kind"] == "fit"
        return pack(replace(parcel, arrays=change(parcel.arrays)) if fit else parcel)

    built.grid.nodes[101] = answer
    (done,) = deployed(built, rounds=1)
    assert {failure.client for failure in done.failures} == {0, 1}
    assert {failure.stage for failure in done.failures} == {stage}
    assert np.isfinite(done.state.params_D).all()


def test_a_node_runs_no_codec_but_ours(federation):
    from fedlearn.errors import FedlearnError

    built = federation()
    built.engine.exchange.settings = {**built.order, "compress": {"_target_": "site_problem.linear"}}
    with pytest.raises(FedlearnError, match=r"compress\._target_ is site_problem\.linear"):
        remote_scenario(built.engine)
