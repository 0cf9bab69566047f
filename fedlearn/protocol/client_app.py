"""Forward messages between Flower and the trainer of a node, as the node's Flower `ClientApp`.

Flower starts a process for each message, with code from the coordinator. Therefore this process has no data and no
framework. It sends the bytes of a request to the trainer, a process of the node's operator, and returns the bytes of
the response. The node's configuration has the path of the trainer's Unix socket:
``--node-config 'socket="/run/fedlearn/trainer.sock"'``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlearn.protocol.grid_client import from_record_dict, to_record_dict

METHOD = "/fedlearn.Trainer/Call"
CHUNK_BYTES = 2**20  # bytes in one gRPC message, below the limit of gRPC
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)

log = logging.getLogger(__name__)
app = ClientApp()


@app.query()
def forward(message: Message, context: Context) -> Message:
    """Forward a request to the trainer and return its response.

    Raises:
        RuntimeError: The node's configuration has no socket, or the trainer does not respond.
    """
    socket = context.node_config.get("socket")
    if not isinstance(socket, str):
        raise RuntimeError(
            "the node's configuration has no socket of a trainer: --node-config 'socket=\"/path/trainer.sock\"'"
        )
    try:
        response = call_trainer(socket, from_record_dict(message.content), timeout_s=message.metadata.ttl)
    except RuntimeError as error:  # its text has paths of this node
        log.error("%s", error)
        raise RuntimeError("the trainer of this node does not respond; its messenger has logged the reason") from None
    return Message(to_record_dict(response), reply_to=message)


def call_trainer(socket: str, payload: bytes, *, timeout_s: float) -> bytes:
    """Send a request to the trainer and return its response.

    Args:
        socket: path of the trainer's Unix socket.
        payload: packed request.
        timeout_s: seconds to wait for the response, > 0.

    Returns:
        The packed response.

    Raises:
        RuntimeError: No trainer uses the socket, or it does not respond in time.
    """
    with grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS) as channel:
        call = channel.stream_stream(METHOD)
        try:
            return b"".join(call(split_chunks(payload), timeout=timeout_s))
        except grpc.RpcError as error:
            raise RuntimeError(f"the trainer at {socket} does not respond: {_reason(error)}") from None


def split_chunks(payload: bytes) -> Iterator[bytes]:
    """Yield the bytes of a message in chunks of `CHUNK_BYTES`."""
    for start in range(0, len(payload), CHUNK_BYTES):
        yield payload[start : start + CHUNK_BYTES]


def _reason(error: grpc.RpcError) -> str:
    code = error.code() if isinstance(error, grpc.Call) else None
    return f"{code.name if code else 'error'}: {error.details() if isinstance(error, grpc.Call) else error}"
