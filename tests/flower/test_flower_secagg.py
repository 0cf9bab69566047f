"""Real ClientApps, real messages, no network: a grid in this process."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower")
pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedlearn import LocalSettings, Order, Schedule, SettingError, Work, federate, serial, start
from fedlearn.client import client_step, initial_memory
from fedlearn.flower.secagg import mount, secure_sum
from fedlearn.masking import folded, secagg
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.errors import Aborted
from fedlearn.privacy.secagg.keys import Identity
from fedlearn.privacy.secagg.records import Notes, Session, decode
from fedlearn.privacy.secagg.server import Stage
from fedlearn.testing import LinearTrainer, linear_problem
from strategies import fedavg

SIZE, LENGTH = 5, 12
VECTORS = np.random.default_rng(0).integers(0, 2**32, (SIZE, LENGTH), dtype=np.uint32)
IDENTITIES = [Identity(client) for client in range(SIZE)]
REGISTERED = {identity.client: identity.public for identity in IDENTITIES}


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """What Flower tells the process of a ServerApp about itself."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class InProcessGrid(Grid):
    """Each message runs the node's ClientApp at once; ``silent`` nodes never answer, from a stage on."""

    def __init__(self, apps):
        self.apps = apps
        self.contexts = {
            n: Context(run_id=1, node_id=n, node_config={}, state=RecordDict(), run_config={}) for n in apps
        }
        self.replies, self.stage = {}, -1
        self.silent, self.tampered = {}, lambda stage, message: message

    run = None

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.apps)

    def push_messages(self, messages):
        self.stage += 1
        return [self.deliver(message) for message in messages]

    def deliver(self, message):
        number, node = f"{self.stage}-{len(self.replies)}-{message.metadata.dst_node_id}", message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = number
        if any(node in nodes for stage, nodes in self.silent.items() if self.stage >= stage):
            return number
        try:
            reply = self.apps[node](self.tampered(Stage(self.stage), message), self.contexts[node])
        except Exception as error:
            reply = Message(Error(code=0, reason=f"Traceback\n{type(error).__name__}: {error}"), reply_to=message)
        self.replies[number] = reply
        return number

    def pull_messages(self, message_ids):
        return [self.replies.pop(number) for number in list(message_ids) if number in self.replies]


def app_of(vector):
    app = ClientApp()
    mount(app, client=lambda context, client, kept: Client(IDENTITIES[client], REGISTERED, kept=kept), vector=vector)
    return app


def own_vector(session, client, content, context):
    return VECTORS[client]


def a_grid(vector=own_vector, nodes=range(100, 100 + SIZE)):
    return InProcessGrid({node: app_of(vector) for node in nodes})


def a_session(round=1):
    return Session(
        run=b"flower", round=round, nonce=os.urandom(16), clients=tuple(range(SIZE)), threshold=3, length=LENGTH
    )


def summed(grid, round=1, **more):
    grid.stage = -1
    nodes = dict(zip(range(SIZE), list(grid.apps) * SIZE, strict=False))
    return secure_sum(grid, a_session(round), nodes, REGISTERED, timeout=0.3, **more)


def plain(clients):
    return VECTORS[list(clients)].sum(axis=0, dtype=np.uint32)


def test_client_apps_give_the_exact_sum_and_keep_no_secret_afterwards():
    grid = a_grid()
    outcome = summed(grid)
    assert np.array_equal(outcome.sum, plain(range(SIZE)))
    assert (outcome.clients, outcome.failures) == (tuple(range(SIZE)), ())
    assert outcome.bytes_up > SIZE * 4 * LENGTH
    for client, context in enumerate(grid.contexts.values()):
        kept = context.state.config_records[f"secagg.{client}"]["kept"]
        assert decode(kept, Notes) == Notes(run=b"flower", round=1, stage=5)


@pytest.mark.parametrize("stage", list(Stage)[:5], ids=lambda stage: stage.name.lower())
def test_nodes_that_fall_silent_at_any_stage_are_waited_for_no_longer_than_the_timeout_and_named(stage):
    grid = a_grid()
    grid.silent = {stage: (100, 103)}
    began = time.monotonic()
    outcome = summed(grid)
    assert time.monotonic() - began < 5 * 0.3 + 2
    there = (1, 2, 4) if stage <= Stage.MASK else range(SIZE)
    assert np.array_equal(outcome.sum, plain(there))
    assert {failure.client for failure in outcome.failures} == {0, 3}
    assert outcome.failures[0].reason == "no answer within 0.3 s"
    assert outcome.failures[0].stage == f"secagg.{stage.name.lower()}"


@pytest.mark.parametrize("stage", list(Stage)[:5], ids=lambda stage: stage.name.lower())
def test_too_few_nodes_give_no_sum_a_named_cause_and_a_next_round_that_works(stage):
    grid = a_grid()
    grid.silent = {stage: (100, 101, 103)}
    with pytest.raises(
        Aborted, match=r"2 of 5 clients answered.* the first: client 0, no answer within 0.3 s"
    ) as aborted:
        summed(grid)
    assert aborted.value.stage == stage.name.lower()
    assert {failure.client for failure in aborted.value.failures} == {0, 1, 3}
    grid.silent = {}
    assert np.array_equal(summed(grid, round=2).sum, plain(range(SIZE)))


def test_a_client_whose_training_fails_is_a_dropout_with_its_own_reason():
    def vector(session, client, content, context):
        if client == 2:
            raise RuntimeError("the scanner is offline")
        return VECTORS[client]

    outcome = summed(a_grid(vector))
    assert np.array_equal(outcome.sum, plain((0, 1, 3, 4)))
    (failure,) = outcome.failures
    assert (failure.client, failure.stage) == (2, "secagg.mask")
    assert failure.reason == "RuntimeError: the scanner is offline"


def test_a_refusal_comes_back_as_a_reason_and_the_others_go_on():
    grid = a_grid()

    def tampered(stage, message):
        if stage == Stage.MASK and message.metadata.dst_node_id == 101:
            message.content["secagg"] = ConfigRecord({"client": 1, "message": b"fsa\1\1"})
        return message

    grid.tampered = tampered
    outcome = summed(grid)
    assert np.array_equal(outcome.sum, plain((0, 2, 3, 4)))
    assert outcome.failures[0].reason == "the client refused: Session ends too early"


def test_a_round_cannot_be_opened_again_by_asking_again():
    grid = a_grid()
    summed(grid)
    with pytest.raises(Aborted, match="round 1 is over: it is opened at most once"):
        summed(grid)


def test_one_node_may_hold_several_clients():
    grid = a_grid(nodes=(7, 8))
    outcome = summed(grid)
    assert np.array_equal(outcome.sum, plain(range(SIZE)))


def test_what_is_sent_along_reaches_the_clients_when_they_make_their_vectors():
    seen = []

    def vector(session, client, content, context):
        seen.append(content.config_records["order"]["factor"])
        return VECTORS[client]

    summed(a_grid(vector), content=RecordDict({"order": ConfigRecord({"factor": 3})}))
    assert seen == [3] * SIZE


@pytest.mark.parametrize("masking", [secagg(clip_norm=10.0), secagg(clip_norm=10.0, modulus_bits=64, bits=40)])
def test_a_round_on_nodes_gives_the_model_of_the_simulated_one_bit_for_bit(masking):
    data, trainer = linear_problem(num_clients=SIZE), LinearTrainer(3)
    strategy, local = masking.protect(fedavg(weighting="equal"), num_clients=SIZE), LocalSettings(batch_size=4)
    state = start(strategy, trainer.init(1), serial(data, trainer), seed=1)
    simulated = next(federate(strategy, serial(data, trainer), state, schedule=Schedule(rounds=1), local=local))
    order = Order(round=1, seed=1, params_D=state.params_D, local=local, deployed=True)

    def vector(session, client, content, context):
        memory = initial_memory(strategy, trainer.layout, order.params_D)
        work = Work(client=client, examples=data.train(client), memory=memory)
        return client_step(trainer, strategy, order, [work])[0].delta_KD[0]

    session = replace(
        a_session(),
        threshold=masking.threshold_of(SIZE),
        length=masking.length(trainer.layout),
        bits=masking.modulus_bits,
    )
    grid = a_grid(vector)
    outcome = secure_sum(grid, session, dict(enumerate(grid.apps)), REGISTERED, timeout=5)
    update_D = strategy.aggregate.done(folded(outcome.sum, len(outcome.clients)))
    assert np.array_equal(state.params_D + update_D, simulated.state.params_D)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_waits_are_bounded(timeout):
    with pytest.raises(SettingError, match="timeout"):
        secure_sum(a_grid(), a_session(), {}, REGISTERED, timeout=timeout)
