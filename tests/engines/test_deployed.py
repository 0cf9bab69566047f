"""The deployed engine and real node services behind a Flower `Grid`: equal to the simulation, and planted faults."""

import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlearn import LocalSettings, Schedule, federate, judge, serial, stacked, start
from fedlearn.algorithm import with_buffer_policy
from fedlearn.core import checkpoint
from fedlearn.errors import SettingError, TooManyFailures
from fedlearn.runner.instantiation import build
from fedlearn.runner.registry import installed_registry
from fedlearn.testing import LOCAL_SETTINGS
from simulations.datasets.uci_heart import UCI_FILES

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.serialization import pack, unpack
from fedlearn.deploy.coordinator_side.remote_scenario import remote_scenario
from fedlearn.deploy.node_side.reveal import Reveal
from fedlearn.protocol.membership import FederationError
from fedlearn.protocol.messages import VERSION, NodeRequest
from fedlearn.protocol.sites import RunSites


def simulated(built, rounds=3, buffers="refuse", local=LOCAL_SETTINGS, **schedule):
    scenario = build(built.settings["scenario"], "scenario", allow=built.allow)
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    strategy = with_buffer_policy(strategy, scenario.trainer.layout, buffers)
    engine = serial(scenario.data, scenario.trainer)
    state = start(strategy, scenario.trainer.init(1), engine, seed=1)
    plan = Schedule(rounds=rounds, **schedule)
    return list(federate(strategy, engine, state, schedule=plan, local=local, evaluate=judge(scenario)))


def deployed(built, rounds=3, state=None, evaluate=True, buffers="refuse", local=LOCAL_SETTINGS, **schedule):
    engine, scenario = built.engine, remote_scenario(built.engine)
    strategy = with_buffer_policy(
        build(built.settings["strategy"], "strategy", allow=built.allow), engine.layout, buffers
    )
    state = state or start(strategy, scenario.trainer.init(1), engine, seed=1)
    plan = Schedule(rounds=rounds, **schedule)
    judged = judge(scenario) if evaluate else None
    return list(federate(strategy, engine, state, schedule=plan, local=local, evaluate=judged))


def tampered(site, change, *, kind="fit"):
    """Return a node whose responses of one kind are changed: ``change(payload) -> payload or bytes``."""

    def answer(data):
        response = site.respond_to_bytes(data)
        payload = unpack(response)
        if payload.metadata["kind"] != kind:
            return response
        changed = change(payload)
        return changed if isinstance(changed, bytes) else pack(changed)

    return answer


def wait_for_members(built, there):
    """Update the list of members until it fulfills a condition."""
    ends = time.monotonic() + 120
    while not there(built.engine.membership.members_by_client()):
        assert time.monotonic() < ends
        built.engine.exchange.update_members(0)
        time.sleep(0.05)


def with_array(name, change):
    return lambda parcel: replace(parcel, arrays={**parcel.arrays, name: change(parcel.arrays[name])})


@pytest.mark.parametrize("policy", ["average", "local"])
def test_statistics_of_batches_are_averaged_or_kept_at_real_nodes_as_in_simulation(federation, policy):
    pytest.importorskip("torch")
    built = federation(scenario="normed", words={"buffers": policy}, strategy="fedadam")
    there, here = (run(built, rounds=2, buffers=policy) for run in (deployed, simulated))
    assert np.array_equal(there[-1].state.params_D, here[-1].state.params_D)
    assert built.engine.layout.buffers == ("norm.running_mean", "norm.running_var")
    for metric in ("loss", "rmse"):
        assert there[-1].evaluation.pooled[metric] == pytest.approx(here[-1].evaluation.pooled[metric], rel=1e-6)


NAMES = ("fedavg", "fedprox", "fedadam", "scaffold", "fedper", "ditto", "qfedavg", "afl", "ifca", "oort")
NAMES += ("fedala", "fedamp")


@pytest.mark.parametrize("name", NAMES)
def test_a_deployed_run_gives_the_parameters_of_a_simulated_one_bit_for_bit(federation, name):
    words = {"strategy": {"personal_parameters": "out.bias"}} if name == "fedper" else {}
    built = federation(strategy=name, words=words)
    there, here = deployed(built)[-1], simulated(built)[-1]
    assert np.array_equal(there.state.params_D, here.state.params_D)
    assert there.metrics == here.metrics
    assert (there.bytes_up, there.bytes_down, there.num_examples) == (here.bytes_up, here.bytes_down, here.num_examples)
    for metric, value in here.evaluation.pooled.items():
        assert there.evaluation.pooled[metric] == pytest.approx(value, rel=1e-6, nan_ok=True)
        assert np.allclose(there.evaluation.per_client[metric], here.evaluation.per_client[metric], equal_nan=True)
    assert (there.evaluation.personal is None) == (name not in ("ditto", "ifca", "fedala", "fedamp"))
    if there.evaluation.personal:
        found, expected = (item.evaluation.personal.per_client["loss"] for item in (there, here))
        assert np.allclose(found, expected)


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_nodes_weight_gradients_with_momentum_as_in_simulation(federation, name):
    built = federation(strategy=name, words={"strategy": {"momentum": 0.9}})
    local = replace(LOCAL_SETTINGS, momentum=0.9)
    there, here = deployed(built, local=local)[-1], simulated(built, local=local)[-1]
    assert np.array_equal(there.state.params_D, here.state.params_D)
    other = federation(strategy=name, words={"strategy": {"momentum": 0.0}})
    assert not np.array_equal(here.state.params_D, simulated(other)[-1].state.params_D)


def test_nodes_train_a_model_with_several_inputs_as_in_simulation(federation):
    pytest.importorskip("torch")
    built = federation(scenario="several_inputs")
    there, here = deployed(built)[-1], simulated(built)[-1]
    assert np.array_equal(there.state.params_D, here.state.params_D)
    for metric in ("loss", "accuracy"):
        assert there.evaluation.pooled[metric] == pytest.approx(here.evaluation.pooled[metric], rel=1e-6)


LOCAL_STEPS = ("fedsam", "proxskip", "fedgkd")  # the others are slow
SLOW_LOCAL_STEPS = ("fedspeed", "fedcm", "fedntd", "feddecorr")


@pytest.mark.parametrize(
    "name", [*LOCAL_STEPS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LOCAL_STEPS)]
)
def test_nodes_take_the_local_steps_of_a_strategy_as_in_simulation(federation, name):
    scenario = "classes" if name in ("fedntd", "fedgkd", "feddecorr") else "linear"
    built = federation(strategy=name, scenario=scenario)
    there, here = deployed(built)[-1], simulated(built)[-1]
    assert np.array_equal(there.state.params_D, here.state.params_D)
    assert there.metrics == here.metrics
    plain = simulated(federation(strategy="fedavg", scenario=scenario))[-1]
    assert np.abs(plain.state.params_D - here.state.params_D).max() > 1e-4


LOCAL_TRAINING = [
    {"optimizer": "adam", "learning_rate": 0.01},
    {"optimizer": "adam", "learning_rate": 0.01, "optimizer_state": "keep"},
    {"optimizer": "adam", "learning_rate": 0.01, "optimizer_state": "average"},
    {"schedule": {"name": "cosine", "warmup": 1}, "momentum": 0.5},
    {"schedule": {"name": "linear", "over": "steps"}, "max_grad_norm": 0.1},
    {"class_weights": "balanced", "label_smoothing": 0.1, "micro_batch_size": 3},
    {"class_weights": [1.0, 2.0, 0.5], "weight_decay": 0.01},
    {"precision": "bfloat16"},
]


@pytest.mark.slow
@pytest.mark.parametrize("local", LOCAL_TRAINING, ids=str)
def test_nodes_train_with_the_optimizers_schedules_and_weights_of_a_simulation(federation, local):
    changes_loss = {"class_weights", "precision"} & local.keys()
    pytest.importorskip("torch")
    built = federation(scenario="torch_classes" if changes_loss else "linear")
    settings = LocalSettings(batch_size=4, **local)
    there, here = (run(built, local=settings)[-1] for run in (deployed, simulated))
    assert np.array_equal(there.state.params_D, here.state.params_D)
    assert np.abs(simulated(built)[-1].state.params_D - here.state.params_D).max() > 1e-6


def test_a_node_refuses_a_rule_that_its_trainer_does_not_apply(federation, caplog):
    built = federation(strategy="feddecorr")
    with pytest.raises(FederationError, match="cannot build the strategy"):
        deployed(built, evaluate=False)
    assert "strategy is one with a penalty in the loss" in caplog.text


def test_clients_spread_over_nodes_in_any_way_give_the_same_model(federation):
    built = federation(clients=((3,), (0, 2), (1,)))
    assert np.array_equal(deployed(built)[-1].state.params_D, simulated(built)[-1].state.params_D)


def test_the_coordinator_learns_the_problem_from_its_nodes(federation):
    built = federation()
    scenario = remote_scenario(built.engine)
    assert (scenario.name, scenario.model, scenario.data.task.name) == ("linear", "linear 3-1", "regression")
    assert built.engine.clients == (0, 1, 2, 3)
    assert scenario.data.num_train == {0: 5, 1: 9, 2: 13, 3: 17}
    assert scenario.trainer.framework == "numpy"
    assert "2 sites" in built.engine.describe(4)


def test_a_raising_training_is_that_clients_failure_and_its_reason_stays_at_the_node(federation, caplog):
    built = federation(scenario="spoilt", words={"scenario": {"how": "raises"}})
    (item,) = deployed(built, rounds=1, evaluate=False)
    (failure,) = item.failures
    assert (failure.client, failure.stage) == (1, "fit")
    reference = re.fullmatch(
        r"site node101: local training failed \(reference (\w+) in the log of the node\)", failure.reason
    )[1]
    assert failure.traceback == ""
    assert "Traceback" in caplog.text
    assert f"reference {reference}: RuntimeError: the scanner is offline" in caplog.text
    assert item.num_updates == 3


def test_an_update_that_is_not_finite_never_touches_the_model(federation):
    built = federation()

    def nan_in_first(delta_KD):
        return np.where(np.arange(len(delta_KD))[:, None] == 0, np.nan, delta_KD).astype(np.float32)

    built.grid.nodes[102] = tampered(built.sites[102], with_array("delta", nan_in_first))
    (item,) = deployed(built, rounds=1, evaluate=False)
    assert [(f.client, f.stage) for f in item.failures] == [(2, "update")]
    assert "not finite" in item.failures[0].reason
    assert np.isfinite(item.state.params_D).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_array("delta", lambda v: v[:, :-1]), "shape"),
        (with_array("delta", lambda v: v.astype(np.float64)), "float64"),
        (with_array("delta", lambda v: v[:1]), "shape"),
        (with_array("num_examples", lambda v: v.astype(np.int32)), "int32"),
        (lambda p: replace(p, arrays={k: v for k, v in p.arrays.items() if k != "delta"}), "no delta"),
        (lambda p: replace(p, arrays={**p.arrays, "extra/more": p.arrays["delta"]}), "vectors"),
        (lambda p: replace(p, metadata={**p.metadata, "layout": "0" * 64}), "layout"),
        (lambda p: replace(p, metadata={**p.metadata, "round": 7}), "round"),
        (lambda p: replace(p, metadata={**p.metadata, "run": "another"}), "run"),
        (lambda p: replace(p, metadata={**p.metadata, "clients": [0, 2]}), "clients"),
        (lambda p: replace(p, metadata={**p.metadata, "clients": [2, 2]}), "clients"),
        (lambda p: replace(p, metadata={**p.metadata, "failures": "none"}), "failures"),
        (lambda p: b"\x80\x04nonsense", "cannot be read"),
        (lambda p: pack(p)[:-3], "cannot be read"),
        (lambda p: pack(p).replace(b'\\"version\\": %d' % VERSION, b'\\"version\\": 9'), "format 9"),
        (with_array("delta", lambda v: np.zeros((2, 2**19), np.float32)), "bytes"),
    ],
    ids=["shape", "dtype", "rows", "count dtype", "no delta", "extra", "layout", "round", "run", "stranger", "twice",
         "facts", "no parcel", "cut short", "version", "oversize"],
)  # fmt: skip
def test_a_malformed_response_is_refused_before_it_touches_the_model(federation, change, reason):
    built = federation()
    built.grid.nodes[102] = tampered(built.sites[102], change)
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.5)
    assert [(f.client, f.stage) for f in item.failures] == [(2, "response"), (3, "response")]
    assert reason in item.failures[0].reason
    assert built.engine.exchange.grid_client.num_ignored["malformed"] == 1
    alone = federation(clients=((0, 1),))
    assert np.array_equal(item.state.params_D, deployed(alone, rounds=1, evaluate=False)[0].state.params_D)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: replace(p, metadata={**p.metadata, "clients": []}), "0 clients"),
        (lambda p: replace(p, metadata={**p.metadata, "clients": [2, 2]}), "occurs twice"),
        (lambda p: with_content(p, num_examples=[13]), "1 example counts"),
        (lambda p: with_content(p, num_examples=[13, -1]), "num_examples"),
        (lambda p: with_content(p, names={"2": "a"}), "names"),
        (lambda p: with_content(p, task="guess"), "the task is guess"),
        (lambda p: with_content(p, supports_metrics=1), "supports_metrics"),
        (lambda p: with_content(p, num_classes=2**40), "classes, expected at most"),
        (lambda p: with_content(p, leaves=[["w", [2**50, 2**50], "float32", False]]), "too many parameters"),
        (lambda p: with_content(p, masking_key="ab"), "masking key"),
        (lambda p: b"\x80\x04nonsense", "cannot be read"),
        (lambda p: pack(p) + bytes(9 * 2**20), "expected at most"),
    ],
)
def test_a_malformed_description_of_a_node_is_refused_by_name(federation, change, reason):
    built = federation()
    built.grid.nodes[102] = tampered(built.sites[102], change, kind="hello")
    with pytest.raises(FederationError, match=rf"refused   site node102: .*{reason}"):
        built.engine.open()


def with_content(payload, **fields):
    return replace(payload, metadata={**payload.metadata, "content": {**payload.metadata["content"], **fields}})


@pytest.mark.parametrize(
    "change",
    [
        with_array("params", lambda v: v * np.float32(np.nan)),
        with_array("params", lambda v: v[:-1]),
        lambda p: replace(p, arrays={}),
        lambda p: replace(p, arrays={**p.arrays, "more": p.arrays["params"]}),
    ],
    ids=["nan", "shape", "none", "more"],
)
def test_malformed_initial_parameters_are_not_used_and_their_site_is_named(federation, change, caplog):
    built = federation()
    expected = built.engine.initial_parameters(1)
    built.grid.nodes[101] = tampered(built.sites[101], change, kind="init")
    assert np.array_equal(built.engine.initial_parameters(1), expected)  # the next site draws them
    problem = r"site node10\d \(clients ., .\) sends no initial parameters: .*params|no param"
    assert re.search(problem, caplog.text)
    built.grid.nodes[102] = tampered(built.sites[102], change, kind="init")
    with pytest.raises(FederationError, match=problem):
        built.engine.initial_parameters(1)


@pytest.mark.parametrize(
    "change",
    [
        with_array("num_examples", lambda v: v * 0),
        with_array("sum/squared_error", lambda v: v * np.inf),
        with_array("sum/squared_error", lambda v: v[:1]),
        lambda p: replace(p, arrays={name: v for name, v in p.arrays.items() if name != "sum/squared_error"}),
        lambda p: replace(p, metadata={**p.metadata, "clients": [0, 2]}),
    ],
    ids=["count", "infinite", "rows", "missing", "clients"],
)
def test_a_malformed_evaluation_is_a_failure_of_its_clients(federation, change):
    built = federation()
    built.grid.nodes[102] = tampered(built.sites[102], change, kind="evaluate")
    (done,) = deployed(built, rounds=1, max_failures=0.5)
    assert done.evaluation.clients == (0, 1)
    assert [(f.client, f.stage) for f in done.failures] == [(2, "evaluate"), (3, "evaluate")]
    assert "KeyError" not in done.failures[0].reason


def test_a_response_from_another_node_than_the_request_went_to_is_ignored(federation):
    built = federation(deadline=2.0)
    built.engine.open()
    pull = built.grid.pull_messages

    def forged(ids):
        messages = pull(ids)
        for message in messages:
            if message.metadata.src_node_id == 102:
                message.metadata.__dict__["_src_node_id"] = 101
        return messages

    built.grid.pull_messages = forged
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.5)
    assert [(f.client, f.stage) for f in item.failures] == [(2, "node"), (3, "node")]
    assert built.engine.exchange.grid_client.num_ignored["unknown_sender"] == 1


def test_a_response_replayed_from_an_earlier_round_is_refused(federation):
    built = federation()
    first = []

    def replay(payload):
        reply = built.sites[102].respond_to_bytes(payload)
        if unpack(reply).metadata["kind"] == "fit":
            first.append(reply)
            return first[0]
        return reply

    built.grid.nodes[102] = replay
    rounds = deployed(built, rounds=2, evaluate=False, max_failures=0.5)
    assert rounds[0].failures == ()
    assert {f.client for f in rounds[1].failures} == {2, 3}
    assert "is to another request" in rounds[1].failures[0].reason


def test_an_update_may_not_weigh_more_than_its_node_said(federation):
    built = federation()
    built.grid.nodes[102] = tampered(built.sites[102], with_array("num_examples", lambda v: v * 1000))
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.5)
    assert {f.client for f in item.failures} == {2, 3}
    assert "13000 training examples; the node declared 13" in item.failures[0].reason


@pytest.mark.parametrize("tell", [lambda v: v * 0, None], ids=["nothing counted", "absent"])
def test_an_update_without_the_loss_that_it_is_weighed_by_is_refused(federation, tell):
    def change(parcel):
        kept = {k: v for k, v in parcel.arrays.items() if k != "count/loss/w_global" or tell}
        kept = {k: v for k, v in kept.items() if k != "total/loss/w_global" or tell}
        return replace(parcel, arrays={k: tell(v) if k == "count/loss/w_global" else v for k, v in kept.items()})

    built = federation(strategy="qfedavg")
    built.grid.nodes[102] = tampered(built.sites[102], change)
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.5)
    assert [(f.client, f.stage) for f in item.failures] == [(2, "update"), (3, "update")]
    assert "loss of w_global" in item.failures[0].reason
    assert np.isfinite(item.state.params_D).all()


@pytest.mark.parametrize("change", [lambda v: v * 0, None], ids=["nothing counted", "absent"])
def test_an_update_without_the_training_loss_that_a_rule_reads_is_refused(federation, change):
    def without_loss(payload):
        kept = {k: v for k, v in payload.arrays.items() if change or k not in ("count/loss", "total/loss")}
        return replace(payload, arrays={k: change(v) if k == "count/loss" else v for k, v in kept.items()})

    built = federation()
    built.grid.nodes[102] = tampered(built.sites[102], without_loss)
    rule = stacked(lambda updates, state, context: (updates.delta_KD[0], state), reads=("metrics",))
    strategy = replace(build(built.settings["strategy"], "strategy", allow=built.allow), aggregate=rule)
    state = start(strategy, remote_scenario(built.engine).trainer.init(1), built.engine, seed=1)
    plan = Schedule(rounds=1, max_failures=0.5)
    (done,) = federate(strategy, built.engine, state, schedule=plan, local=LOCAL_SETTINGS)
    assert [(f.client, f.stage) for f in done.failures] == [(2, "update"), (3, "update")]
    assert "loss of training" in done.failures[0].reason


def test_answers_that_come_twice_are_counted_once(federation):
    built = federation()
    built.grid.twice = True
    there = deployed(built)
    assert np.array_equal(there[-1].state.params_D, simulated(built)[-1].state.params_D)
    assert built.engine.exchange.grid_client.num_ignored["duplicate"] > 0


@pytest.mark.parametrize("deaths", [1, 99], ids=["once", "always"])
def test_a_message_whose_link_dies_during_the_upload_is_sent_again_so_often(federation, deaths):
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    built = federation()
    built.engine.open()
    push, died = built.grid.push_messages, []

    def dies_first(messages):
        if len(died) < deaths:
            died.append(messages)
            raise ObjectPushError("part", 1, "session")
        return push(messages)

    built.grid.push_messages = dies_first
    if deaths == 1:
        assert np.array_equal(deployed(built)[-1].state.params_D, simulated(built)[-1].state.params_D)
    else:
        with pytest.raises(FederationError, match="Flower did not accept the message"):
            deployed(built)


def test_a_node_that_never_answers_costs_a_deadline_and_is_named(federation):
    built = federation(deadline=2.0)
    built.engine.open()
    built.grid.nodes[102] = None
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.5)
    assert [(f.client, f.stage) for f in item.failures] == [(2, "node"), (3, "node")]
    assert item.failures[0].reason == "site node102: no response within 2 s"


def test_a_late_answer_is_counted_and_ignored_and_its_memory_never_happened(federation):
    built = federation(strategy="scaffold", deadline=2.0)
    built.engine.open()
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    state = start(strategy, built.engine.initial_parameters(1), built.engine, seed=1)
    plan = Schedule(rounds=3, max_failures=0.5)
    gate = built.grid.shut(102)
    rounds = federate(strategy, built.engine, state, schedule=plan, local=LOCAL_SETTINGS)
    assert {f.client for f in next(rounds).failures} == {2, 3}
    gate.set()
    built.grid.until_arrived()  # after the coordinator stopped waiting for it
    built.engine.exchange.timeout_s = 120.0
    second = next(rounds)
    assert second.failures == ()
    assert built.engine.exchange.grid_client.num_ignored["expired"] == 1
    # clients whose first update was lost start the second round with the client state from before the first
    assert built.engine.client_states[2]["round"] == 2


def test_too_few_updates_by_the_deadline_stop_the_run_by_name(federation):
    built = federation(deadline=2.0, min_updates=3)
    built.engine.open()
    built.grid.nodes[102] = None
    with pytest.raises(
        FederationError, match=r"2 updates, fewer than engine.min_updates=3 .*client 2.*no response within"
    ):
        deployed(built, rounds=1, evaluate=False, max_failures=0.5)


def test_a_round_closes_with_enough_updates_and_spares_do_not_count_as_failures(federation):
    built = federation(clients=((0,), (1,), (2,), (3,)), min_completed=3)
    built.engine.open()
    gate = built.grid.shut(103)
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.0)
    assert not gate.is_set()
    assert [(f.client, f.stage) for f in item.failures] == [(2, "not_needed")]
    assert item.num_updates == 3


def test_closing_early_is_refused_where_a_privacy_claim_rests_on_the_draw(federation):
    built = federation(min_completed=1)
    strategy = build(built.settings["strategy"], "strategy")
    promise = PrivacyGuarantee(
        kind="test",
        unit="client",
        adjacency="one client more or less",
        charge=lambda ledger, release: ledger,
        epsilon_of=lambda ledger: None,
    )
    private = replace(strategy, privacy_guarantee=promise)
    with pytest.raises(SettingError, match=r"engine\.min_completed"):
        list(built.engine.fit(None, private, [0]))


def test_a_node_that_disappears_fails_by_name_and_one_that_comes_back_takes_part_again(federation):
    built = federation(deadline=2.0)
    built.engine.open()
    strategy = build(built.settings["strategy"], "strategy")
    state = start(strategy, built.engine.initial_parameters(1), built.engine, seed=1)
    rounds = federate(
        strategy, built.engine, state, schedule=Schedule(rounds=4, max_failures=0.5), local=LOCAL_SETTINGS
    )
    assert next(rounds).failures == ()
    node = built.grid.nodes.pop(102)
    second = next(rounds)
    assert [(f.client, f.stage) for f in second.failures] == [(2, "node"), (3, "node")]
    assert "connected" in second.failures[0].reason
    built.grid.nodes[205] = node  # under another node id: the client ids identify the clients
    wait_for_members(built, lambda homes: 2 in homes)
    assert next(rounds).failures == ()


def test_a_new_client_takes_part_from_the_next_round_on(federation):
    built = federation(clients=((0, 1), (2,), (3,)), sites=RunSites(min_sites=2))
    late = built.grid.nodes.pop(103)
    built.engine.open()
    assert built.engine.clients == (0, 1, 2)
    built.grid.nodes[103] = late
    wait_for_members(built, lambda homes: 3 in homes)
    (item,) = deployed(built, rounds=1, evaluate=False)
    assert item.cohort == (0, 1, 2)  # the cohort was chosen before the list of members was updated
    assert built.engine.clients == (0, 1, 2, 3)


def test_two_nodes_that_claim_the_same_client_are_refused_by_name(federation):
    built = federation(clients=((0, 1), (1, 2)))
    with pytest.raises(FederationError, match=r"site node10\d and site node10\d both claim client 1"):
        built.engine.open()


def test_the_node_with_another_model_is_named(federation):
    built = federation(clients=((0,), (1,), (2,)))
    builder = built.sites[102].builder
    builder._with_operator_settings = lambda settings: {**settings, "num_features": 5}
    with pytest.raises(
        FederationError, match=r"site node102 \(client 1\) does not fit .*out.weight 1x5, and the other .*1x3"
    ):
        built.engine.open()


def test_missing_nodes_end_the_wait_by_name(federation):
    built = federation(sites=RunSites(min_sites=3), join_timeout=2.0)
    with pytest.raises(
        FederationError, match=r"2 of 2 sites joined \(after 2 s\)\n  expected  at least 3 of these sites"
    ):
        built.engine.open()


def test_an_order_outside_a_nodes_policy_is_refused_with_its_reason(federation, caplog):
    built = federation(policy={"strategies": {"fedprox": {"mu": [0, 1]}}})
    with pytest.raises(FederationError, match=r"strategy fedavg is not accepted; this node"):
        built.engine.open()
    assert "refused a request hello of run test-run" in caplog.text  # the node logs it too


def test_a_refused_order_reaches_the_rounds_failures(federation):
    built = federation()
    built.restart(102, policy={"max_rounds": 1})
    with pytest.raises(TooManyFailures, match=r"client 2, at stage policy: .*max_rounds=1"):
        deployed(built, rounds=2, evaluate=False)
    _, second = deployed(federation(run="another"), rounds=2, evaluate=False, max_failures=0.5)
    assert second.failures == ()


def test_a_run_resumed_from_a_checkpoint_ends_as_an_uninterrupted_one(federation, tmp_path):
    """Check a coordinator that dies two rounds after its checkpoint; the nodes keep running and repeat them."""
    built = federation(strategy="scaffold")
    whole = simulated(built, rounds=5)[-1].state
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    state = start(strategy, built.engine.initial_parameters(1), built.engine, seed=1)
    for done in federate(strategy, built.engine, state, schedule=Schedule(rounds=4), local=LOCAL_SETTINGS):
        if done.number == 2:
            path = checkpoint.save(
                tmp_path / "saved", done.state, built.engine.client_states, layout=built.engine.layout
            )
    again = type(built.engine)(
        built.grid, built.order, run="test-run", sites=RunSites(min_sites=2), join_timeout=120, deadline=120
    )
    again.open()
    state, memories = checkpoint.load(path, again.layout)
    again.client_states.update(memories)
    *_, last = federate(strategy, again, state, schedule=Schedule(rounds=5), local=LOCAL_SETTINGS)
    assert np.array_equal(last.state.params_D, whole.params_D)


def test_memory_that_a_node_has_lost_is_told_instead_of_started_anew(federation, tmp_path):
    built = federation(strategy="scaffold")
    deployed(built, rounds=1, evaluate=False)
    for path in tmp_path.glob("memory1/test-run/client_000003/*"):
        path.unlink()
    built.engine.client_states[3] = {"round": np.array(1)}
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    state = replace(start(strategy, built.engine.initial_parameters(1), built.engine, seed=1), round=1)
    (item,) = federate(strategy, built.engine, state, schedule=Schedule(rounds=2), local=LOCAL_SETTINGS)
    assert [(f.client, f.stage) for f in item.failures] == [(3, "client_state")]
    assert "the state of the client is missing or damaged" in item.failures[0].reason


@pytest.mark.parametrize("stage", ["not_needed", "evaluate"])
def test_a_node_cannot_fail_in_a_way_that_counts_as_no_failure(federation, stage):
    built = federation()
    shirks = [{"client": client, "stage": stage, "reason": "not today"} for client in (2, 3)]

    def shirking(parcel):
        return replace(parcel, metadata={**parcel.metadata, "clients": [], "failures": shirks}, arrays={})

    built.grid.nodes[102] = tampered(built.sites[102], shirking)
    with pytest.raises(TooManyFailures, match="2 of 4 clients failed"):
        deployed(built, rounds=1, evaluate=False)


def test_a_client_that_its_nodes_answer_leaves_out_is_a_failure(federation):
    built = federation()
    built.grid.nodes[102] = tampered(
        built.sites[102], lambda parcel: replace(parcel, metadata={**parcel.metadata, "clients": []}, arrays={})
    )
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.5)
    assert [(f.client, f.stage) for f in item.failures] == [(2, "response"), (3, "response")]
    assert "leaves the client out" in item.failures[0].reason


def test_a_node_started_again_with_other_clients_is_asked_anew_who_lives_there(federation):
    built = federation(clients=((0, 1), (2, 3)))
    built.engine.open()
    built.restart(102, config={"clients": (2,)})
    strategy = build(built.settings["strategy"], "strategy")
    state = start(strategy, built.engine.initial_parameters(1), built.engine, seed=1)
    rounds = federate(
        strategy, built.engine, state, schedule=Schedule(rounds=3, max_failures=0.5), local=LOCAL_SETTINGS
    )
    assert [(f.client, f.stage) for f in next(rounds).failures] == [(2, "request"), (3, "request")]
    wait_for_members(built, lambda homes: 2 in homes)
    assert [(f.client, f.stage) for f in next(rounds).failures] == [(3, "node")]


def test_a_node_may_keep_its_metrics_to_itself(federation):
    built = federation(policy={"reveal": Reveal(min_test_examples=10)})
    (item,) = deployed(built, rounds=1)
    assert item.evaluation.clients == (2, 3)  # the other clients have 5 and 9 held-out examples
    assert item.failures == ()


def test_a_run_goes_on_without_the_metrics_of_nodes_that_keep_them(federation):
    built = federation()
    built.restart(102, policy={"reveal": Reveal(metrics=False)})
    (item,) = deployed(built, rounds=1)
    assert item.evaluation.clients == (0, 1)
    assert item.failures == ()
    built = federation(policy={"reveal": Reveal(metrics=False)}, run="another")
    (item,) = deployed(built, rounds=1)
    assert item.evaluation is None
    assert item.failures == ()


def test_a_messenger_that_cannot_reach_its_trainer_is_a_failure_with_its_reason(federation):
    built = federation(deadline=2.0)
    built.engine.open()

    def broken(payload):
        raise RuntimeError("the trainer of this node does not respond")

    built.grid.nodes[102] = broken
    (item,) = deployed(built, rounds=1, evaluate=False, max_failures=0.5)
    assert [f.stage for f in item.failures] == ["node", "node"]
    assert "the trainer of this node does not respond" in item.failures[0].reason


@pytest.mark.parametrize("kind", ["fit", "evaluate"])
def test_a_request_that_fails_is_asked_again_within_its_deadline_with_equal_bits(federation, kind):
    lines = []
    built = federation(sites=RunSites(report=lines.append))
    built.engine.open()
    answer, failed = built.sites[102].respond_to_bytes, []

    def fails_twice(data):
        if NodeRequest.unpack(data).kind == kind and len(failed) < 2:
            failed.append(answer(data))  # the node does the work, and its response is lost
            raise RuntimeError("the trainer of this node does not respond")
        return answer(data)

    built.grid.nodes[102] = fails_twice
    there, here = deployed(built, max_failures=0.0)[-1], simulated(built)[-1]
    assert np.array_equal(there.state.params_D, here.state.params_D)
    assert len(failed) == 2
    assert "is asked again: <class 'RuntimeError'>" in lines[0]


def test_a_node_that_connects_anew_gets_the_request_that_its_last_connection_lost(federation):
    since = {}
    built = federation(connected_since=lambda: dict(since))
    built.engine.open()
    answer, lost = built.sites[102].respond_to_bytes, []

    def loses_first(data):
        if not lost:
            lost.append(data)
            since[102] = time.time()
            time.sleep(600)  # the thread of this message never answers
        return answer(data)

    built.grid.nodes[102] = loses_first
    assert np.array_equal(deployed(built, max_failures=0.0)[-1].state.params_D, simulated(built)[-1].state.params_D)
    assert len(lost) == 1


def test_a_round_waits_for_a_node_that_took_part_and_is_back_within_the_deadline(federation):
    lines = []
    built = federation(sites=RunSites(report=lines.append))
    built.engine.open()
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    state = start(strategy, built.engine.initial_parameters(1), built.engine, seed=1)
    rounds = federate(strategy, built.engine, state, schedule=Schedule(rounds=3), local=LOCAL_SETTINGS)
    next(rounds)
    node = built.grid.nodes.pop(102)
    threading.Timer(1.0, lambda: built.grid.nodes.update({102: node})).start()
    assert [item.failures for item in rounds] == [(), ()]


def test_the_command_line_of_a_simulation_says_how_to_deploy():
    from fedlearn.engines.deployed import grid

    with pytest.raises(SettingError, match=r"fedlearn\.deploy\.submit"):
        grid(None, None)


@pytest.mark.parametrize("strategy", ["fedavg"])
def test_nodes_in_torch_and_nodes_in_jax_train_the_model_of_an_all_torch_simulation(federation, strategy):
    pytest.importorskip("torch", reason="the extra torch is not installed")
    pytest.importorskip("jax", reason="the extra jax is not installed")
    built = federation(
        strategy=strategy,
        policy={"scenarios": {"digits": {"partition": {"one_of": ["dirichlet"]}}}},
        deadline=60,
        join_timeout=60,
    )
    chosen = {"name": "digits", "partition": {"name": "dirichlet", "num_clients": 4}}
    built.settings["scenario"] = installed_registry().resolve("scenario", chosen)
    built.engine.exchange.settings = {**built.order, "scenario": chosen}
    for node, framework in zip(list(built.sites), ("torch", "jax"), strict=True):
        built.restart(node, config={"framework": framework})
    there, here = deployed(built, rounds=10, evaluate=False)[-1], simulated(built, rounds=10, evaluate_every=10)[-1]
    assert built.engine.describe(4).startswith("2 sites: node101, node102 (1 with jax, 1 with torch)")
    assert np.abs(there.state.params_D - here.state.params_D).max() < 1e-4


def test_hospitals_that_each_have_their_own_file_only_train_the_model_of_a_simulation(federation, tmp_path):
    pytest.importorskip("torch", reason="the extra torch is not installed")
    shelf = Path(os.environ.get("FEDLEARN_DATA", Path(__file__).parents[3] / "shared" / "data")) / "heart-disease-uci"
    if not shelf.is_dir():
        pytest.skip("UCI's own heart disease files are not available (set FEDLEARN_DATA)")
    built = federation(
        clients=((0,), (1,), (2,), (3,)), policy={"scenarios": {"heart": {}}}, deadline=60, join_timeout=60
    )
    for node, name in zip(list(built.sites), UCI_FILES, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes((shelf / name).read_bytes())
        built.restart(node, config={"data": folder})
    built.settings["scenario"] = {"_target_": "simulations.scenarios.heart.heart", "path": str(shelf)}
    built.engine.exchange.settings = {**built.order, "scenario": "heart"}
    there, here = deployed(built)[-1], simulated(built)[-1]
    assert np.array_equal(there.state.params_D, here.state.params_D)
    assert there.evaluation.pooled["accuracy"] == here.evaluation.pooled["accuracy"]
