"""The protocol with honest participants returns the exact sum, or no result."""

from contextlib import suppress
from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")
from fedlearn.privacy.secagg import in_memory
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.errors import ProtocolError, SecAggAborted
from fedlearn.privacy.secagg.messages import MaskedVector, UnmaskShares, decode, encode
from fedlearn.privacy.secagg.server import Server, ServerStage

STAGES = [ServerStage.ADVERTISE, ServerStage.SHARE, ServerStage.MASK, ServerStage.CONFIRM, ServerStage.OPEN]


def vectors_of(num_clients, length, dtype=np.uint32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, (num_clients, length), dtype=dtype, endpoint=True)


def exchange(vectors_KD, threshold, silent, replies=None):
    ids = range(len(vectors_KD))
    clients, registered = in_memory.create_clients(ids)
    if replies is not None:
        clients = {client: RecordingClient(clients[client], replies.setdefault(client, [])) for client in ids}
    session = in_memory.create_session(vectors_KD, ids, threshold=threshold, round=1, run=b"test")
    return in_memory.run_protocol(session, clients, registered, dict(enumerate(vectors_KD)), dropouts=silent)


class RecordingClient:
    """A client that records its responses."""

    def __init__(self, client, replies):
        self.client, self.replies = client, replies

    def respond(self, message, vector):
        self.replies.append(self.client.respond(message, vector))
        return self.replies[-1]


def plain_sum(vectors_KD, silent):
    """Return the sum over the clients that were still available when masked vectors were due, and their ids."""
    gone = set(
        chain(*(silent.get(stage, ()) for stage in (ServerStage.ADVERTISE, ServerStage.SHARE, ServerStage.MASK)))
    )
    there = [k for k in range(len(vectors_KD)) if k not in gone]
    return vectors_KD[there].sum(axis=0, dtype=vectors_KD.dtype), tuple(there)


def subsets(items, most):
    return chain.from_iterable(combinations(items, size) for size in range(most + 1))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
@pytest.mark.parametrize(("size", "threshold"), [(2, 2), (3, 2), (5, 3)])
def test_any_dropouts_at_any_stage_down_to_the_threshold_leave_the_exact_sum(size, threshold, stage):
    vectors_KD = vectors_of(size, 7)
    for gone in subsets(range(size), size - threshold):
        total = exchange(vectors_KD, threshold, {stage: gone})
        expected_D, there = plain_sum(vectors_KD, {stage: gone})
        assert np.array_equal(total.sum, expected_D)
        assert total.clients == there


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_dropouts_spread_over_all_stages_leave_the_exact_sum(data):
    size = data.draw(st.integers(2, 16))
    threshold = data.draw(st.integers(size // 2 + 1, size))
    dtype = data.draw(st.sampled_from([np.uint16, np.uint32, np.uint64]))
    gone = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size - threshold))
    silent = {}
    for client in gone:
        silent.setdefault(data.draw(st.sampled_from(STAGES)), []).append(client)
    vectors_KD = vectors_of(size, data.draw(st.integers(1, 40)), dtype)
    total = exchange(vectors_KD, threshold, silent)
    expected_D, there = plain_sum(vectors_KD, silent)
    assert total.sum.dtype == dtype
    assert np.array_equal(total.sum, expected_D)
    assert total.clients == there


def test_wrong_shares_of_a_dropout_give_no_sum():
    vectors_KD = vectors_of(5, 7)
    clients, registered = in_memory.create_clients(range(5))
    clients[0] = CheatingClient(clients[0])
    session = in_memory.create_session(vectors_KD, range(5), threshold=3, round=1, run=b"test")
    with pytest.raises(SecAggAborted, match="client 4 do not give the secret of its key"):
        in_memory.run_protocol(
            session, clients, registered, dict(enumerate(vectors_KD)), dropouts={ServerStage.MASK: [4]}
        )


class CheatingClient:
    """A client that reveals wrong shares of the secrets of dropouts."""

    def __init__(self, client):
        self.client = client

    def respond(self, message, vector):
        response = self.client.respond(message, vector)
        with suppress(ProtocolError):
            shares = decode(response, UnmaskShares)
            wrong = {client: bytes(len(share)) for client, share in shares.key_shares.items()}
            return encode(replace(shares, key_shares=wrong))
        return response


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
def test_below_the_threshold_a_round_gives_nothing_and_the_next_one_works(stage):
    vectors_KD = vectors_of(5, 6)
    clients, registered = in_memory.create_clients(range(5))
    vectors = dict(enumerate(vectors_KD))

    def session(round):
        return in_memory.create_session(vectors_KD, range(5), threshold=4, round=round, run=b"test")

    def lose(server):
        requests = server.start()
        while requests:
            silent = {0, 1} if server.stage >= stage else set()
            for client in set(requests) - silent:
                server.add(client, clients[client].respond(requests[client], lambda _, c=client: vectors[c]))
            requests = server.advance()

    server = Server(session(1), registered)
    with pytest.raises(SecAggAborted, match="fewer than threshold 4") as aborted:
        lose(server)
    assert aborted.value.stage == stage.name.lower()
    assert server.total is None
    assert not np.any(server._sum)
    total = in_memory.run_protocol(session(2), clients, registered, vectors)
    assert np.array_equal(total.sum, vectors_KD.sum(axis=0, dtype=np.uint32))


def test_a_client_may_live_in_another_process_for_every_message():
    vectors_KD = vectors_of(4, 5)
    first, registered = in_memory.create_clients(range(4))
    kept = dict.fromkeys(first, b"")

    class Reborn:
        def __init__(self, client):
            self.client = client

        def respond(self, message, vector):
            client = Client(first[self.client].identity, registered, state=kept[self.client])
            reply = client.respond(message, vector)
            kept[self.client] = client.state
            return reply

    session = in_memory.create_session(vectors_KD, range(4), threshold=3, round=1, run=b"test")
    reborn = {client: Reborn(client) for client in first}
    total = in_memory.run_protocol(
        session, reborn, registered, dict(enumerate(vectors_KD)), dropouts={ServerStage.MASK: [2]}
    )
    assert np.array_equal(total.sum, vectors_KD[[0, 1, 3]].sum(axis=0, dtype=np.uint32))


def masked_upload(vectors_KD):
    """Return the masked vector of client 0, which it sends in the third stage."""
    replies = {}
    exchange(vectors_KD, len(vectors_KD) // 2 + 1, {}, replies)
    return np.frombuffer(decode(replies[0][ServerStage.MASK], MaskedVector).vector, vectors_KD.dtype)


def test_a_single_masked_upload_is_uniform():
    length = 2**20
    upload_D = masked_upload(np.zeros((3, length), np.uint32))
    for byte in upload_D.view(np.uint8).reshape(-1, 4).T:  # each of the four bytes, 256 values
        counts = np.bincount(byte, minlength=256)
        statistic = float(np.sum((counts - length / 256) ** 2) / (length / 256))
        assert chi2.ppf(1e-7, 255) < statistic < chi2.ppf(1 - 1e-7, 255)


def test_a_masked_upload_does_not_look_like_the_update():
    rng = np.random.default_rng(1)
    update_D = rng.normal(size=200_000)
    encoded_D = np.rint(update_D * 2**16).astype(np.int64).astype(np.uint32)
    vectors_KD = np.stack([encoded_D, *(np.zeros_like(encoded_D),) * 2])
    upload_D = masked_upload(vectors_KD).view(np.int32).astype(np.float64)
    unmasked_D = encoded_D.view(np.int32).astype(np.float64)
    assert np.corrcoef(unmasked_D, update_D)[0, 1] > 0.999
    assert abs(np.corrcoef(upload_D, update_D)[0, 1]) < 5 / np.sqrt(len(update_D))


def test_two_rounds_mask_the_same_vector_differently():
    vectors_KD = vectors_of(3, 100)
    assert not np.any(masked_upload(vectors_KD) == masked_upload(vectors_KD))
