"""A transfer that is cut continues with the part that was in progress."""

from __future__ import annotations

import random
import time
from collections import Counter
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedlearn.flower import transfer
from fedlearn.flower.compat.fleet import FleetClient, MissingParts
from fedlearn.flower.compat.messages import identify_as_node, identify_as_server, set_message_id
from fedlearn.flower.transfer import continue_after_cuts
from fedlearn.protocol.grid_client import from_record_dict, to_record_dict

CUTS = [httpx.ConnectError("no"), httpx.ReadError("cut"), httpx.ReadTimeout("late"), httpx.RemoteProtocolError("ended")]
DATA = np.random.default_rng(1).bytes(23 * 10**6)  # five parts


class CutServer:
    """Serve the parts of a message, and cut the connection at random."""

    def __init__(self, message=None, share=0.5):
        self.sent, self.stored, self.random, self.share = Counter(), {}, random.Random(1), share
        self.message, self.num_announcements = message, 0
        self.parts = {key: part.deflate() for key, part in get_all_nested_objects(message).items()} if message else {}

    def cut(self):
        if self.random.random() < self.share:
            raise self.random.choice(CUTS)

    def PullMessages(self, request):
        head = message_to_proto(remove_content_from_message(self.message))
        return PullMessagesResponse(messages_list=[head], message_object_trees=[get_object_tree(self.message)])

    def PullObject(self, request):
        self.cut()
        self.sent[request.object_id] += 1
        content = self.parts[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request):
        return None

    def PushMessages(self, request):
        self.num_announcements += 1
        wanted = {node.object_id for tree in request.message_object_trees for node in _nodes(tree)} - self.stored.keys()
        return PushMessagesResponse(objects_to_push=wanted, session_id="s")

    def PushObject(self, request):
        self.cut()
        self.sent[request.object_id] += 1
        self.stored[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)


def _nodes(tree):
    yield tree
    for child in tree.children:
        yield from _nodes(child)


def client_of(server):
    fleet = FleetClient.__new__(FleetClient)
    fleet._client, fleet._folder, fleet._max_bytes = server, None, 2**30
    return fleet


@pytest.fixture
def message(monkeypatch):
    monkeypatch.setattr(transfer, "RETRY_INTERVAL_S", 0.0)
    identify_as_server()
    sent = Message(to_record_dict(DATA), 2, "query", ttl=600.0)
    set_message_id(sent, sent.object_id)
    return sent


def test_a_download_that_is_cut_again_and_again_loads_each_part_once(message):
    server = CutServer(message)
    received = client_of(server).pull(2)
    assert from_record_dict(received.content) == DATA
    assert len(server.sent) >= 5
    assert set(server.sent.values()) == {1}


def test_an_upload_that_is_cut_sends_each_part_once_with_one_announcement(message):
    identify_as_node(message)
    response = Message(to_record_dict(DATA), reply_to=message)
    server = CutServer(share=0.5)
    client_of(server).push(2, response)
    assert server.stored.keys() == get_all_nested_objects(response).keys()
    assert len(server.stored) >= 5
    assert set(server.sent.values()) == {1}
    assert server.num_announcements == 1  # the SuperLink refuses a second one once the run knows the response


def test_a_part_that_was_stored_before_the_cut_counts_as_stored(message):
    identify_as_node(message)
    response, server = Message(to_record_dict(DATA), reply_to=message), CutServer(share=0.0)
    store, cut = server.PushObject, []

    def push(request):
        if request.object_id in server.stored:
            return PushObjectResponse(stored=False)  # as the SuperLink, which waits for each part once
        store(request)
        cut.append(request.object_id)
        raise httpx.ReadError("cut")

    server.PushObject = push
    client_of(server).push(2, response)
    assert server.stored.keys() == set(cut)


def test_a_part_that_the_server_refuses_at_once_is_missing(message):
    identify_as_node(message)
    server = CutServer(share=0.0)
    server.PushObject = lambda request: PushObjectResponse(stored=False)
    with pytest.raises(MissingParts):
        client_of(server).push(2, Message(to_record_dict(DATA), reply_to=message))


def test_a_server_that_does_not_come_back_ends_the_transfer():
    def call(request):
        raise httpx.ConnectError("no")

    waits = []

    def sleep(seconds):
        waits.append(seconds)
        time.sleep(0.01)

    with pytest.raises(httpx.ConnectError):
        continue_after_cuts(call, timeout_s=0.05, sleep=sleep)(1)
    assert waits


def test_an_answer_of_the_server_is_not_repeated():
    calls = []

    def refuse(request):
        calls.append(request)
        raise httpx.HTTPStatusError("403", request=None, response=SimpleNamespace(status_code=403))

    with pytest.raises(httpx.HTTPStatusError):
        continue_after_cuts(refuse)(1)
    assert calls == [1]
