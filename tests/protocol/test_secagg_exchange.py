"""The coordinator's half of a secure aggregation round, with clients in memory."""

import os

import numpy as np
import pytest

pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")

from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.crypto import Identity
from fedlearn.privacy.secagg.errors import ProtocolError, SecAggAborted
from fedlearn.privacy.secagg.messages import Session
from fedlearn.privacy.secagg.server import ServerStage
from fedlearn.protocol.secagg_exchange import SecAggResponse, run_secure_sum

SIZE, LENGTH = 5, 12
VECTORS = np.random.default_rng(0).integers(0, 2**32, (SIZE, LENGTH), dtype=np.uint32)
IDENTITIES = [Identity(client) for client in range(SIZE)]
REGISTERED = {identity.client: identity.public_key for identity in IDENTITIES}


class Clients:
    """Clients that respond to each message at once; ``silent`` clients do not respond from a stage on."""

    def __init__(self):
        self.clients = [Client(identity, REGISTERED) for identity in IDENTITIES]
        self.silent, self.tampered = {}, {}

    def exchange(self, stage, requests):
        gone = {client for first, clients in self.silent.items() if stage >= first for client in clients}
        for client, request in requests.items():
            if client in gone:
                yield SecAggResponse(client, reason="no answer within 1 s")
                continue
            request = self.tampered.get((stage, client), request)
            try:
                yield SecAggResponse(
                    client, self.clients[client].respond(request, lambda session, current=client: VECTORS[current])
                )
            except ProtocolError as refused:
                yield SecAggResponse(client, reason=f"the client refused: {refused}")


def total(clients, round=1):
    session = Session(
        run=b"test", round=round, nonce=os.urandom(16), clients=tuple(range(SIZE)), threshold=3, length=LENGTH
    )
    return run_secure_sum(session, REGISTERED, clients.exchange)


def plain(clients):
    return VECTORS[list(clients)].sum(axis=0, dtype=np.uint32)


def test_the_sum_is_exact():
    outcome = total(Clients())
    assert np.array_equal(outcome.sum, plain(range(SIZE)))
    assert (outcome.clients, outcome.failures) == (tuple(range(SIZE)), ())
    assert outcome.num_bytes_up > SIZE * 4 * LENGTH


@pytest.mark.parametrize("stage", list(ServerStage)[:5], ids=lambda stage: stage.name.lower())
def test_clients_that_fall_silent_at_any_stage_are_named(stage):
    clients = Clients()
    clients.silent = {stage: (0, 3)}
    outcome = total(clients)
    assert np.array_equal(outcome.sum, plain((1, 2, 4) if stage <= ServerStage.MASK else range(SIZE)))
    assert {failure.client for failure in outcome.failures} == {0, 3}
    assert outcome.failures[0].reason == "no answer within 1 s"
    assert outcome.failures[0].stage == f"secagg.{stage.name.lower()}"


@pytest.mark.parametrize("stage", list(ServerStage)[:5], ids=lambda stage: stage.name.lower())
def test_too_few_clients_give_no_sum_a_named_cause_and_a_next_round_that_works(stage):
    clients = Clients()
    clients.silent = {stage: (0, 1, 3)}
    with pytest.raises(SecAggAborted, match=r"2 of 5 parties responded.* the first: client 0, no answer") as aborted:
        total(clients)
    assert aborted.value.stage == stage.name.lower()
    assert {failure.client for failure in aborted.value.failures} == {0, 1, 3}
    clients.silent = {}
    assert np.array_equal(total(clients, round=2).sum, plain(range(SIZE)))


def test_a_refusal_is_a_failure_with_its_reason_and_the_others_go_on():
    clients = Clients()
    clients.tampered = {(ServerStage.MASK, 1): b"fsa\3\1\x80"}
    outcome = total(clients)
    assert np.array_equal(outcome.sum, plain((0, 2, 3, 4)))
    assert outcome.failures[0].reason == "the client refused: Session is not an array of 9 fields"


def test_a_round_cannot_be_opened_twice():
    clients = Clients()
    total(clients)
    with pytest.raises(SecAggAborted, match="round 1 is over: it is opened at most once"):
        total(clients)
