"""A request, a response and the description of a node, for tests of messages."""

from __future__ import annotations

import numpy as np

from fedlearn import Updates
from fedlearn.core import Failure, Request
from fedlearn.core.layout import Layout
from fedlearn.core.records import MetricSum
from fedlearn.protocol.membership import Member
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.training_order import pack_order
from fedlearn.protocol.updates import UpdateReader, pack_updates

LAYOUT = Layout.from_shapes([("out.weight", (1, 3)), ("out.bias", (1,))])
READER = UpdateReader(sizes={"delta": 4, "change": 4})
MAX_BYTES = 2**20
MEMBER = Member(
    layout=LAYOUT,
    num_examples={2: 10, 5: 20},
    names={2: "north", 5: "south"},
    name="linear",
    task="binary",
    num_classes=2,
    model="linear 3-1",
    partition="natural",
    framework="numpy",
    device="cpu",
    supports_metrics=True,
    masking_key="ab" * 32,
)


def order(**changes):
    fields = {"round": 3, "seed": 7, "params_D": np.arange(4, dtype=np.float32)}
    return Request(**{**fields, **changes})


REQUEST = NodeRequest(
    kind=RequestKind.FIT,
    run="r",
    round=3,
    id="abc",
    settings={"scenario": {}},
    clients=(2, 5),
    state_rounds=(0, 2),
    layout=LAYOUT.digest,
    shared=pack_order(order()),
)


def training_request(layout, settings, local, **order_fields):
    """Return a request of round 1 to client 0, with parameters of zeros."""
    params_D = np.zeros(layout.num_parameters, np.float32)
    request = Request(round=1, seed=1, params_D=params_D, local=local, **order_fields)
    return NodeRequest(
        kind=RequestKind.FIT,
        run="r",
        round=1,
        id="1",
        settings=settings,
        clients=(0,),
        state_rounds=(0,),
        layout=layout.digest,
        shared=pack_order(request),
    )


def updates(*clients, value=1.0):
    k = len(clients)
    return Updates(
        clients_K=np.array(clients),
        delta_KD=np.full((k, 4), value, np.float32),
        num_examples_K=np.full(k, 10, np.int64),
        num_steps_K=np.full(k, 2, np.int64),
        metrics={"loss": MetricSum(np.ones(k), np.full(k, 10.0))},
        client_state={"private": np.ones((k, 4), np.float32)},
        extra={"change": np.ones((k, 4), np.float32)},
    )


def response_with(*results, **fields):
    delivered = [result for result in results if isinstance(result, Updates)]
    return NodeResponse.to(
        REQUEST,
        clients=tuple(int(result.clients_K[0]) for result in delivered),
        failures=tuple(result for result in results if isinstance(result, Failure)),
        content=pack_updates(delivered),
        **fields,
    )
