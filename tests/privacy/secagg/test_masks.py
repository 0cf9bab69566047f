"""Each masked vector has a self mask and pairwise masks of its own, from secrets that serve one session only."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")
from fedlearn.privacy.secagg import crypto, in_memory
from fedlearn.privacy.secagg.messages import ClientState, MaskedVector, PublicKeys, UnmaskShares, decode
from fedlearn.privacy.secagg.server import Server, ServerStage

CLIENTS = range(4)
VECTORS = dict(enumerate(np.random.default_rng(3).integers(0, 2**32, (len(CLIENTS), 1000), dtype=np.uint32)))


class Recorded:
    """A run of several rounds with the same clients; it records responses, states and the keys of masks."""

    def __init__(self, monkeypatch):
        self.clients, self.registered = in_memory.create_clients(CLIENTS)
        self.responses, self.states, self.mask_keys = [], [], []
        add_mask = crypto.add_mask

        def record(vector, key, *, sign):
            self.mask_keys[-1].append(key)
            add_mask(vector, key, sign=sign)

        monkeypatch.setattr(crypto, "add_mask", record)

    def round(self, number, withheld=(), run=b"test"):
        """Run a round; the server receives the masked vectors of ``withheld`` clients too late."""
        rows_KD = np.stack([*VECTORS.values()])
        session = in_memory.create_session(rows_KD, CLIENTS, threshold=3, round=number, run=run)
        server = Server(session, self.registered)
        requests = server.start()
        self.responses.append({})
        self.states.append({})
        self.mask_keys.append([])
        while requests:
            stage = server.stage
            for client, request in requests.items():
                response = self.clients[client].respond(request, lambda _, c=client: VECTORS[c])
                self.responses[-1][stage, client] = response
                self.states[-1][stage, client] = decode(self.clients[client].state, ClientState)
                if not (stage == ServerStage.MASK and client in withheld):
                    server.add(client, response)
            requests = server.advance()
        return server


def test_a_vector_that_arrives_after_its_client_was_declared_dropped_stays_masked(monkeypatch):
    """Remove all pairwise masks, which the server then knows, and look for the vector."""
    recorded = Recorded(monkeypatch)
    server = recorded.round(1, withheld=(0,))
    responses = {client: recorded.responses[0][ServerStage.OPEN, client] for client in (1, 2, 3)}
    opened = {client: decode(response, UnmaskShares) for client, response in responses.items()}
    secret = server._reconstruct(0, opened, "key_shares")
    upload_D = np.frombuffer(decode(recorded.responses[0][ServerStage.MASK, 0], MaskedVector).vector, np.uint32).copy()
    for peer in (1, 2, 3):
        key = crypto.pairwise_mask_key(
            crypto.private_key(secret), server._roster[peer].mask_key, server._digest, 0, peer
        )
        crypto.add_mask(upload_D, key, sign=-1)
    assert not np.any(upload_D == VECTORS[0])
    seed = recorded.states[0][ServerStage.MASK, 0].seed
    crypto.add_mask(upload_D, crypto.self_mask_key(seed, server._digest, 0), sign=-1)
    assert np.array_equal(upload_D, VECTORS[0])  # the attack above removed everything else


def test_the_self_mask_of_a_survivor_differs_from_its_pairwise_masks_and_from_those_of_others(monkeypatch):
    recorded = Recorded(monkeypatch)
    recorded.round(1)
    uses = Counter(recorded.mask_keys[0])
    pairs = len(CLIENTS) * (len(CLIENTS) - 1) // 2
    assert len(uses) == pairs + len(CLIENTS)
    assert set(uses.values()) == {2}  # a pair: two clients; a self mask: client and server


def test_secrets_are_fresh_in_each_round_run_and_attempt_and_for_each_client_and_purpose(monkeypatch):
    recorded = Recorded(monkeypatch)
    for number, run in ((1, b"test"), (2, b"test"), (1, b"other"), (2, b"other")):
        recorded.round(number, run=run)
    states = [kept[ServerStage.ADVERTISE, client] for kept in recorded.states for client in CLIENTS]
    secrets = [secret for state in states for secret in (state.seed, state.mask_secret, state.encryption_secret)]
    assert len(set(secrets)) == len(secrets) == 3 * 4 * len(CLIENTS)
    advertised = [decode(r[ServerStage.ADVERTISE, c], PublicKeys) for r in recorded.responses for c in CLIENTS]
    public = [key for keys in advertised for key in (keys.mask_key, keys.encryption_key)]
    assert len(set(public)) == len(public)
    seeds = [decode(r[ServerStage.OPEN, c], UnmaskShares).seed for r in recorded.responses for c in CLIENTS]
    assert seeds == [state.seed for state in states]


@pytest.mark.parametrize("changes", [{"round": 2}, {"run": b"other"}, {"nonce": True}])
def test_masks_depend_on_the_session_even_if_the_secrets_repeat(monkeypatch, changes):
    recorded = Recorded(monkeypatch)
    for session in ({}, changes):
        secrets = iter([bytes([number]) * 16 for number in range(1, 200)])
        monkeypatch.setattr(crypto, "generate_secret", lambda secrets=secrets: next(secrets))
        recorded.clients = {
            c: type(client)(client.identity, client.registered) for c, client in recorded.clients.items()
        }
        recorded.round(session.get("round", 1), run=session.get("run", b"test"))
    first, second = ([state.seed for state in kept.values()] for kept in recorded.states)
    assert first == second  # the secrets do repeat
    assert not set(recorded.mask_keys[0]) & set(recorded.mask_keys[1])
