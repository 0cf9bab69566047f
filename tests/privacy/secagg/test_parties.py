"""Clients with one key are one party: a server and one colluding node cannot unmask the clients of the others."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")
from fedlearn.privacy.secagg import in_memory
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.crypto import Identity, digest
from fedlearn.privacy.secagg.errors import ProtocolError, SecAggAborted
from fedlearn.privacy.secagg.messages import (
    Confirmation,
    KeyDirectory,
    ReceivedShares,
    Survivors,
    UnmaskRequest,
    UnmaskShares,
    decode,
    encode,
    parties_of,
)
from fedlearn.privacy.secagg.server import Server, ServerStage

LENGTH = 6


def vectors_of(clients):
    rng = np.random.default_rng(7)
    return {client: rng.integers(0, 2**32, LENGTH, dtype=np.uint32) for client in clients}


def identities_of(*nodes):
    """Return the identities of the clients of some nodes; each node has one key."""
    secrets = [Identity(0).secret for _ in nodes]
    return {c: Identity(c, secret=secret) for clients, secret in zip(nodes, secrets, strict=True) for c in clients}


def registered_of(identities):
    return {client: identity.public_key for client, identity in identities.items()}


def session_of(identities, threshold, **changes):
    rows_KD = np.zeros((len(identities), LENGTH), np.uint32)
    session = in_memory.create_session(rows_KD, identities, threshold=threshold, round=1, run=b"test")
    return replace(session, **{"parties": parties_of(session.clients, registered_of(identities)), **changes})


class Party:
    """The clients of honest nodes with their states, as `MaskedClients` keeps them."""

    def __init__(self, identities, registered=None, **options):
        self.identities, self.registered = identities, registered or registered_of(identities)
        self.states, self.options = dict.fromkeys(identities, b""), options
        self.vectors = vectors_of(identities)

    def respond(self, client, request, registered=None):
        key = self.identities[client].public_key
        siblings = [s for c, s in self.states.items() if c != client and self.identities[c].public_key == key]
        registered = registered or self.registered
        participant = Client(
            self.identities[client], registered, state=self.states[client], siblings=lambda: siblings, **self.options
        )
        response = participant.respond(request, lambda session: self.vectors[client])
        self.states[client] = participant.state
        return response


def run(identities, threshold, silent=None):
    """Run the protocol with an honest server; return the server."""
    server, nodes, gone = Server(session_of(identities, threshold), registered_of(identities)), Party(identities), set()
    requests = server.start()
    while requests:
        gone |= set((silent or {}).get(server.stage, ()))
        for client in requests.keys() - gone:
            server.add(client, nodes.respond(client, requests[client]))
        requests = server.advance()
    return server, nodes


@pytest.mark.parametrize("claims", ["nothing about parties", "each client is a party", "the truth"])
def test_one_key_for_eight_clients_does_not_give_eight_parties(claims):
    identities = identities_of([0], range(1, 9))
    victim = Party(identities)
    parties = {"nothing about parties": (), "each client is a party": tuple(range(9))}.get(claims)
    changes = {} if parties is None else {"parties": parties}
    with pytest.raises(ProtocolError, match=r"the parties of the session|threshold 5 of 2 parties"):
        victim.respond(0, encode(session_of(identities, 5, **changes)))


def test_a_minimum_counts_keys_and_not_clients():
    identities = identities_of([0], [1, 2, 3], [4, 5, 6])
    with pytest.raises(ProtocolError, match="threshold 3, expected at least 4"):
        Party(identities, min_threshold=4).respond(0, encode(session_of(identities, 3)))


def test_the_keys_may_not_change_to_those_of_one_party_between_messages():
    honest = identities_of(*[[client] for client in range(5)])
    session, victim = session_of(honest, 3), Party({0: honest[0]}, registered_of(honest))
    current = victim.respond(0, encode(session))
    colluder = Identity(1)
    fakes = {client: Identity(client, secret=colluder.secret) for client in range(1, 5)}
    registered = {0: honest[0].public_key, **registered_of(fakes)}
    attackers = {client: Client(fakes[client], registered) for client in fakes}
    server = Server(session, registered)
    server.add(0, current)
    for client, attacker in attackers.items():  # attackers follow another program, which accepts all parties
        attacker._accept_session = lambda session: None
        server.add(client, attacker.respond(encode(session)))
    with pytest.raises(ProtocolError, match="the parties of the session"):
        victim.respond(0, server.advance()[0], registered)


@pytest.mark.parametrize("threshold", [3, 4])
def test_a_threshold_that_one_colluding_party_could_split_is_refused(threshold):
    identities = identities_of(*[[client] for client in range(5)])
    session = encode(session_of(identities, threshold))
    if threshold == 4:
        assert Party(identities, max_colluders=1).respond(0, session)
    else:
        with pytest.raises(ProtocolError, match="threshold 3 of 5 parties, expected more than half of the parties and"):
            Party(identities, max_colluders=1).respond(0, session)


@pytest.mark.parametrize(
    ("silent", "survivors"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({ServerStage.ADVERTISE: [1]}, (0, 2, 3, 4, 5)),
        ({ServerStage.MASK: [1, 2]}, (0, 3, 4, 5)),  # each node still has a client
        ({ServerStage.MASK: [5], ServerStage.CONFIRM: [0], ServerStage.OPEN: [3]}, (0, 1, 2, 3, 4)),
    ],
)
def test_nodes_with_several_clients_get_the_exact_sum(silent, survivors):
    server, nodes = run(identities_of([0, 1], [2, 3], [4], [5]), 3, silent)
    assert server.survivors == survivors
    expected_D = np.sum([nodes.vectors[client] for client in survivors], axis=0, dtype=np.uint32)
    assert np.array_equal(server.total, expected_D)


def test_clients_of_too_few_parties_give_no_sum():
    with pytest.raises(SecAggAborted, match="2 of 4 parties responded, fewer than threshold 3"):
        run(identities_of([0, 1], [2, 3], [4], [5]), 3, {ServerStage.MASK: [4, 5]})  # four of six clients


def test_clients_of_one_party_have_the_same_share():
    server, _ = run(identities_of([0, 1], [2], [3]), 2, {ServerStage.MASK: [3]})
    assert server.session.share_indices() == {0: 1, 1: 1, 2: 2, 3: 3}
    assert server.survivors == (0, 1, 2)


def split_view(siblings):
    """Show two lists of survivors to the two clients of each honest node; return the second list and its signatures."""
    identities = identities_of([0], [1, 2], [3, 4], [5, 6])
    server, nodes = Server(session_of(identities, 3), registered_of(identities)), Party(identities)
    requests = server.start()
    while server.stage < ServerStage.CONFIRM:
        for client, request in requests.items():
            server.add(client, nodes.respond(client, request))
        requests = server.advance()
    shown = decode(requests[0], Survivors)
    without = replace(shown, survivors=(1, 2, 3, 4, 5, 6), dropped=(0,))
    signatures = {}
    for client, record in ((1, shown), (3, shown), (5, shown), (2, without), (4, without), (6, without)):
        if not siblings:
            nodes.identities = {c: replace(i, secret=Identity(c).secret) for c, i in identities.items()}
            nodes.identities[client] = identities[client]
        signatures[client] = decode(nodes.respond(client, encode(record)), Confirmation).signature
    return nodes, without, {client: signatures[client] for client in (2, 4, 6)}


def test_two_clients_of_a_node_do_not_sign_different_survivors():
    """Ask one client of each node for its share of one secret of client 0, and another client for the other share."""
    with pytest.raises(ProtocolError, match="another client of this party has signed other survivors"):
        split_view(siblings=True)
    nodes, without, signatures = split_view(siblings=False)  # the attack works on clients that forget each other
    opening = UnmaskRequest(
        session=without.session, survivors=without.survivors, dropped=without.dropped, signatures=signatures
    )
    assert decode(nodes.respond(6, encode(opening)), UnmaskShares).key_shares[0]


def test_what_a_client_has_signed_is_kept_after_the_round():
    identities = identities_of([0, 1], [2], [3])
    server, nodes = run(identities, 3)
    state = Client(identities[0], registered_of(identities), state=nodes.states[0])._state
    assert (state.confirmed, state.survivors) == (digest(server.session), (0, 1, 2, 3))
    assert not state.seed + state.mask_secret + state.encryption_secret
    assert not state.shares


@pytest.mark.parametrize(("run", "accepted"), [("r", True), ("s", False), ("", False)])
def test_a_session_of_another_run_is_refused(run, accepted):
    identities = identities_of([0], [1], [2])
    session = encode(session_of(identities, 3, run=b"r/0f"))
    if accepted:
        assert Party(identities, run=run).respond(0, session)
    else:
        with pytest.raises(ProtocolError, match="belongs to another run"):
            Party(identities, run=run).respond(0, session)


@pytest.mark.parametrize("parties", [(0, 1), (0, 0, 9), (0, 0, 0)])
def test_a_session_with_unsound_parties_is_refused(parties):
    identities = identities_of([0], [1], [2])
    with pytest.raises(ProtocolError, match=r"a party for each client|cohort of 1 parties"):
        session_of(identities, 2, parties=parties).validate()


def until(stage, identities, threshold):
    """Run an honest server until a stage; return the server, the clients and the next requests."""
    server, nodes = Server(session_of(identities, threshold), registered_of(identities)), Party(identities)
    requests = server.start()
    while server.stage < stage:
        for client, request in requests.items():
            server.add(client, nodes.respond(client, request))
        requests = server.advance()
    return nodes, requests


TWO_OF_FOUR_PARTIES = (0, 1, 2, 3)  # these are four clients, and the threshold is three


@pytest.mark.parametrize("stage", [ServerStage.SHARE, ServerStage.MASK, ServerStage.CONFIRM, ServerStage.OPEN])
def test_a_client_counts_parties_at_each_stage(stage):
    nodes, requests = until(stage, identities_of([0], [1, 2, 3], [4], [5]), 3)
    request = decode(requests[0], KeyDirectory, ReceivedShares, Survivors, UnmaskRequest)
    few = set(TWO_OF_FOUR_PARTIES)
    if stage == ServerStage.SHARE:
        request = replace(request, keys={c: key for c, key in request.keys.items() if c in few})
    elif stage == ServerStage.MASK:
        request = replace(request, encrypted={c: share for c, share in request.encrypted.items() if c in few})
    elif stage == ServerStage.CONFIRM:
        request = replace(request, survivors=TWO_OF_FOUR_PARTIES, dropped=(4, 5))
    else:
        request = replace(request, signatures={c: name for c, name in request.signatures.items() if c in few})
    with pytest.raises(ProtocolError, match=r"2 parties .*fewer than threshold 3|of 2 parties, fewer than threshold 3"):
        nodes.respond(0, encode(request))


@pytest.mark.parametrize(("encoding", "accepted"), [(b"noise", True), (b"less noise", False), (b"", False)])
def test_a_session_with_other_settings_of_noise_is_refused(encoding, accepted):
    identities = identities_of([0], [1], [2])
    session = encode(session_of(identities, 3, encoding=encoding))
    if accepted:
        assert Party(identities, encoding=b"noise").respond(0, session)
    else:
        with pytest.raises(ProtocolError, match="other settings of encoding and noise"):
            Party(identities, encoding=b"noise").respond(0, session)
