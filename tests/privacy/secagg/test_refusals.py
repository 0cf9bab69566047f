"""Messages of a malicious server, or of an attacker on the network, that a client refuses."""

import os
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")
from fedlearn.privacy.secagg import crypto, in_memory
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.crypto import Identity, derive_public_key, digest, generate_secret
from fedlearn.privacy.secagg.errors import ProtocolError
from fedlearn.privacy.secagg.messages import (
    ClientState,
    Confirmation,
    EncryptedShares,
    KeyDirectory,
    PublicKeys,
    ReceivedShares,
    Survivors,
    UnmaskRequest,
    decode,
    encode,
)
from fedlearn.privacy.secagg.server import RESPONSE_TYPES, Server, ServerStage

VECTORS = np.arange(30, dtype=np.uint32).reshape(5, 6)


class Round:
    """A round of five clients with threshold 3, run by an honest server until a stage; the tests attack client 0."""

    def __init__(self, until=ServerStage.ADVERTISE, *, number=1, clients=None, silent=(), **changes):
        self.clients, self.registered = clients or in_memory.create_clients(range(5))
        session = in_memory.create_session(VECTORS, range(5), threshold=3, round=number, run=b"test")
        self.session = replace(session, **changes)
        self.server = Server(self.session, self.registered)
        self.requests = self.server.start()
        self.replies = {}
        while self.server.stage < until:
            silenced = silent if self.server.stage == ServerStage.MASK else ()
            self.replies = {c: self.respond(c) for c in self.requests if c not in silenced}
            for client, reply in self.replies.items():
                self.server.add(client, reply)
            self.requests = self.server.advance()

    def respond(self, client, request=None):
        return self.clients[client].respond(request or self.requests[client], lambda session: VECTORS[client])

    def refuses(self, request, because):
        """Check that client 0 refuses the request and keeps its state."""
        before = self.clients[0].state
        with pytest.raises(ProtocolError, match=because):
            self.respond(0, encode(request))
        assert self.clients[0].state == before


def opened():
    return Round(ServerStage.DONE)


def test_a_client_that_is_said_to_be_both_there_and_gone_is_not_opened():
    attack = Round(ServerStage.CONFIRM, silent=[4])
    shown = decode(attack.requests[0], Survivors)
    overlap = replace(shown, dropped=(*shown.survivors[-1:], *shown.dropped))
    attack.refuses(overlap, "both survivors and dropouts")


def test_no_two_sets_of_survivors_get_confirmed_by_one_client():
    attack = Round(ServerStage.CONFIRM)
    attack.respond(0)
    other = replace(decode(attack.requests[0], Survivors), survivors=(0, 1, 2), dropped=(3, 4))
    attack.refuses(other, "confirmed")


def test_other_survivors_than_those_confirmed_are_not_opened():
    attack = Round(ServerStage.OPEN)
    opening = decode(attack.requests[0], UnmaskRequest)
    attack.refuses(replace(opening, survivors=(0, 1, 2, 3), dropped=(4,)), "differ from the list")


def test_survivors_that_only_some_clients_were_shown_are_not_opened():
    """Split the clients: the server asks some for the seed of client 4's mask, and others for its pairwise secret."""
    split = Round(ServerStage.CONFIRM)
    shown = decode(split.requests[0], Survivors)
    without = replace(shown, survivors=(0, 1, 2, 3), dropped=(4,))
    signatures = {
        c: decode(split.respond(c, encode(without if c in (0, 1) else shown)), Confirmation).signature for c in range(5)
    }
    opening = UnmaskRequest(session=shown.session, survivors=without.survivors, dropped=(4,), signatures={})
    split.refuses(replace(opening, signatures={0: signatures[0], 1: signatures[1]}), "signatures of 2 parties")
    mixed = {c: signatures[c] for c in (0, 1, 2)}
    split.refuses(replace(opening, signatures=mixed), "signature of client 2 under the survivors is not valid")
    twice = {0: signatures[0], 1: signatures[1], 2: signatures[1]}
    split.refuses(replace(opening, signatures=twice), "not valid")


def test_a_round_is_opened_once():
    done = opened()
    with pytest.raises(ProtocolError, match="over"):
        done.respond(0, encode(done.session))
    again = replace(done.session, nonce=os.urandom(16))
    with pytest.raises(ProtocolError, match="round 1 is over: it is opened at most once"):
        done.respond(0, encode(again))


def test_the_request_to_open_does_not_work_twice():
    done = Round(ServerStage.OPEN)
    request = done.requests[0]
    done.respond(0)
    done.refuses(decode(request, UnmaskRequest), "stage is done")


def test_rounds_only_go_forward():
    later = Round(ServerStage.DONE, number=7)
    with pytest.raises(ProtocolError, match="round 6 after round 7"):
        later.respond(0, encode(replace(later.session, round=6, nonce=os.urandom(16))))
    assert later.respond(0, encode(replace(later.session, round=8, nonce=os.urandom(16))))


def test_a_round_that_was_not_opened_may_be_tried_again():
    first = Round(ServerStage.OPEN)
    second = Round(ServerStage.DONE, clients=(first.clients, first.registered))
    assert np.array_equal(second.server.total, VECTORS.sum(axis=0, dtype=np.uint32))


def test_no_secret_is_kept_after_a_round():
    done = opened()
    notes = decode(done.clients[0].state, ClientState)
    kept = {"confirmed": digest(done.session), "survivors": (0, 1, 2, 3, 4)}
    assert notes == ClientState(run=b"test", round=1, stage=5, **kept)


def test_secrets_of_masks_are_gone_once_the_vector_is_masked():
    notes = decode(Round(ServerStage.CONFIRM).clients[0].state, ClientState)
    assert not notes.mask_secret
    assert not notes.encryption_secret


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"threshold": 2}, "more than half"),
        ({"threshold": 6}, "at most 5"),
        ({"clients": (0,), "threshold": 1}, "vector of one party"),
        ({"clients": (0, 0, 1, 2), "threshold": 3}, "ascending"),
        ({"clients": (1, 2, 3), "threshold": 2}, "not in the cohort"),
        ({"bits": 31}, "16, 32 or 64"),
        ({"length": 0}, "vectors of 0"),
        ({"round": 0}, "round number"),
    ],
    ids=lambda value: str(value),
)
def test_unsound_sessions_are_refused(changes, because):
    attack = Round()
    attack.refuses(replace(attack.session, **changes), because)


def test_a_server_refuses_to_ask_for_an_unsound_session():
    with pytest.raises(ProtocolError, match="more than half"):
        Round(threshold=2)


def test_a_client_may_want_to_be_in_larger_sums_only():
    attack = Round()
    identity = attack.clients[0].identity
    attack.clients[0] = Client(identity, attack.registered, min_threshold=4)
    attack.refuses(attack.session, "expected at least 4")


def keys_of(client, identity, session):
    keys = PublicKeys(
        session=session,
        client=client,
        encryption_key=derive_public_key(generate_secret()),
        mask_key=derive_public_key(generate_secret()),
    )
    return encode(identity.sign_keys(keys))


def test_keys_that_someone_in_between_put_in_place_of_a_clients_are_refused():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    forged = keys_of(1, Identity(1), roster.session)
    attack.refuses(
        replace(roster, keys={**roster.keys, 1: forged}), "signature of client 1 under its keys is not valid"
    )


def test_a_client_notices_if_its_own_keys_are_replaced():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    forged = keys_of(0, attack.clients[0].identity, roster.session)
    attack.refuses(replace(roster, keys={**roster.keys, 0: forged}), "changed in transit")


def test_the_keys_of_another_client_are_not_accepted_in_ones_own_place():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    attack.refuses(replace(roster, keys={**roster.keys, 1: roster.keys[2]}), "shown as those of client 1")


def test_keys_of_another_session_are_refused():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    old = keys_of(1, attack.clients[1].identity, digest(replace(attack.session, nonce=os.urandom(16))))
    attack.refuses(replace(roster, keys={**roster.keys, 1: old}), "of another session")


def test_a_public_key_that_appears_twice_is_refused():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    two = decode(roster.keys[2], PublicKeys)
    copy = attack.clients[1].identity.sign_keys(replace(two, client=1))
    attack.refuses(replace(roster, keys={**roster.keys, 1: encode(copy)}), "appears twice")


def test_a_public_key_of_low_order_is_refused():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    item = decode(roster.keys[1], PublicKeys)
    bad = attack.clients[1].identity.sign_keys(replace(item, encryption_key=bytes(32)))
    attack.refuses(replace(roster, keys={**roster.keys, 1: encode(bad)}), "low order")


def test_a_client_without_a_registered_identity_is_refused():
    attack = Round(ServerStage.SHARE)
    attack.clients[0].registered = {c: k for c, k in attack.registered.items() if c != 1}
    attack.refuses(decode(attack.requests[0], KeyDirectory), "no identity is registered for client 1")


def test_a_client_from_outside_the_cohort_is_refused():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    stranger = keys_of(9, Identity(9), roster.session)
    attack.refuses(replace(roster, keys={**roster.keys, 9: stranger}), "not in the cohort")


def test_too_few_at_any_stage_are_refused():
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    attack.refuses(replace(roster, keys={c: roster.keys[c] for c in (0, 1)}), "2 parties have advertised")
    attack = Round(ServerStage.MASK)
    inbox = decode(attack.requests[0], ReceivedShares)
    attack.refuses(replace(inbox, encrypted={1: inbox.encrypted[1]}), "2 parties have shared")
    attack = Round(ServerStage.CONFIRM)
    shown = decode(attack.requests[0], Survivors)
    attack.refuses(replace(shown, survivors=(0, 1), dropped=(2, 3, 4)), "survivors of 2 parties")
    attack = Round(ServerStage.OPEN)
    opening = decode(attack.requests[0], UnmaskRequest)
    attack.refuses(replace(opening, signatures={c: opening.signatures[c] for c in (0, 1)}), "signatures of 2 parties")


def test_participants_do_not_change_between_stages():
    attack = Round(ServerStage.MASK)
    inbox = decode(attack.requests[0], ReceivedShares)
    attack.refuses(replace(inbox, encrypted={**inbox.encrypted, 9: b""}), "not on the roster")
    attack = Round(ServerStage.CONFIRM)
    shown = decode(attack.requests[0], Survivors)
    attack.refuses(replace(shown, survivors=(0, 1, 2, 3)), "not the clients that have shared")
    attack.refuses(replace(shown, survivors=(1, 2, 3, 4), dropped=(0,)), "own vector is not in the sum")


def test_shares_for_another_receiver_sender_or_round_are_refused():
    attack = Round(ServerStage.MASK)
    inbox, other = decode(attack.requests[0], ReceivedShares), decode(attack.requests[1], ReceivedShares)
    attack.refuses(other, "meant for another client")
    attack.refuses(
        replace(inbox, encrypted={**inbox.encrypted, 2: other.encrypted[2]}), "from client 2 are damaged, or not meant"
    )
    swapped = {**inbox.encrypted, 1: inbox.encrypted[2], 2: inbox.encrypted[1]}
    attack.refuses(replace(inbox, encrypted=swapped), "from client 1 are damaged, or not meant")
    earlier = Round(ServerStage.MASK, clients=(attack.clients, attack.registered), number=2)
    attack.refuses(inbox, "another session")
    now = decode(earlier.requests[0], ReceivedShares)
    attack.refuses(replace(now, encrypted={**now.encrypted, 1: inbox.encrypted[1]}), "from client 1 are damaged")
    flipped = bytes([now.encrypted[1][0] ^ 1]) + now.encrypted[1][1:]
    attack.refuses(replace(now, encrypted={**now.encrypted, 1: flipped}), "from client 1 are damaged")


def test_messages_out_of_turn_are_refused():
    attack = Round(ServerStage.OPEN)
    opening = decode(attack.requests[0], UnmaskRequest)
    early = Round(ServerStage.CONFIRM)
    early.refuses(replace(opening, session=digest(early.session)), "stage is masked")
    with pytest.raises(ProtocolError, match="stage is none"):
        Client(early.clients[0].identity, early.registered).respond(early.requests[0])


def test_a_vector_of_another_length_or_type_is_an_error_of_this_client():
    attack = Round(ServerStage.MASK)
    for wrong in (VECTORS[0, :3], VECTORS[0].astype(np.int64), VECTORS[0].astype(np.float32)):
        with pytest.raises(ValueError, match="expected"):
            attack.clients[0].respond(attack.requests[0], lambda session, wrong=wrong: wrong)


@pytest.mark.parametrize(
    "until", [ServerStage.ADVERTISE, ServerStage.SHARE, ServerStage.MASK, ServerStage.CONFIRM, ServerStage.OPEN]
)
def test_a_server_refuses_repetitions_impostors_and_other_sessions(until):
    honest = Round(until)
    reply = honest.respond(0)
    with pytest.raises(ProtocolError, match="sent a response of client"):
        honest.server.add(1, reply)
    record = decode(reply, RESPONSE_TYPES[until])
    with pytest.raises(ProtocolError, match="another session"):
        honest.server.add(0, encode(replace(record, session=bytes(32))))
    honest.server.add(0, reply)
    with pytest.raises(ProtocolError, match="has responded already"):
        honest.server.add(0, reply)


def test_a_server_passes_over_keys_that_are_none_or_not_the_clients():
    honest = Round()
    keys = decode(honest.respond(0), PublicKeys)
    sign = honest.clients[0].identity.sign_keys
    for bad, because in [
        (sign(replace(keys, mask_key=bytes(32))), "low order"),
        (sign(replace(keys, mask_key=keys.encryption_key)), "twice"),
        (replace(keys, mask_key=derive_public_key(generate_secret())), "not valid"),
    ]:
        with pytest.raises(ProtocolError, match=because):
            honest.server.add(0, encode(bad))
    honest.server.add(0, encode(keys))


def test_a_server_passes_over_what_does_not_fit():
    honest = Round(ServerStage.SHARE)
    shares = decode(honest.respond(0), EncryptedShares)
    with pytest.raises(ProtocolError, match="not encrypted a share for each client"):
        honest.server.add(0, encode(replace(shares, encrypted={1: shares.encrypted[1]})))
    honest = Round(ServerStage.MASK)
    masked = decode(honest.respond(0), RESPONSE_TYPES[ServerStage.MASK])
    with pytest.raises(ProtocolError, match="another length"):
        honest.server.add(0, encode(replace(masked, vector=masked.vector[:-1])))
    assert not np.any(honest.server._sum)


DAMAGES = {
    "cut": lambda d: d[:-1],
    "longer": lambda d: d + b"\0",
    "not ours": lambda d: b"x" + d[1:],
    "other version": lambda d: d[:3] + b"\1" + d[4:],
    "unknown kind": lambda d: d[:4] + b"\x63" + d[5:],
    "nothing": lambda d: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_bytes_that_are_no_message_are_refused(damage):
    attack = Round(ServerStage.SHARE)
    before = attack.clients[0].state
    with pytest.raises(ProtocolError):
        attack.clients[0].respond(damage(attack.requests[0]))
    assert attack.clients[0].state == before


def test_a_verified_signature_is_valid_for_its_key_and_its_message_only():
    """Check each part of a signature that the process keeps as valid."""
    identity, other = Identity(0), Identity(1)
    signature = identity.sign(b"message")
    for _ in range(2):  # the second call finds the kept signature
        crypto.verify(identity.public_key, signature, b"message", signer="client 0")
    wrong = [
        (identity.public_key, signature, b"messagf"),
        (other.public_key, signature, b"message"),
        (identity.public_key, other.sign(b"message"), b"message"),
        (identity.public_key, signature + b"m", b"essage"),
        (identity.public_key + signature[:1], signature[1:], b"message"),
    ]
    for arguments in wrong * 2:
        with pytest.raises(ProtocolError, match="not valid"):
            crypto.verify(*arguments, signer="client 0")


def test_kept_signatures_and_keys_need_limited_memory(monkeypatch):
    monkeypatch.setattr(crypto, "MAX_CACHED", 3)
    identity = Identity(0)
    for number in range(9):
        message = bytes([number])
        crypto.verify(identity.public_key, identity.sign(message), message, signer="client 0")
    assert len(crypto._verified) <= 3
    attack = Round(ServerStage.SHARE)
    roster = decode(attack.requests[0], KeyDirectory)
    keys = replace(decode(roster.keys[1], PublicKeys), signature=bytes(crypto.MAX_KEY_BYTES))
    attack.refuses(replace(roster, keys={**roster.keys, 1: encode(keys)}), "expected at most")
    honest = Round()
    keys = decode(honest.respond(0), PublicKeys)
    with pytest.raises(ProtocolError, match="wrong size"):
        honest.server.add(0, encode(replace(keys, signature=bytes(crypto.MAX_KEY_BYTES))))
