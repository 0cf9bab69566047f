"""Carry messages between Flower and the trainer of a node; this is the node's Flower `ClientApp`.

Flower starts a process for each message and brings the code that runs in it from the coordinator. Therefore this
process has neither data nor a framework. It passes the bytes of a request to the trainer, a process of the node's
operator, and returns the bytes of the response. The trainer has a Unix socket, which the node's configuration names:
``--node-config 'socket="/run/fedlearn/trainer.sock"'``.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlearn.protocol.grid_client import from_record_dict, to_record_dict

METHOD = "/fedlearn.Trainer/Call"
CHUNK_BYTES = 2**20  # bytes in one gRPC message, below the limit of gRPC
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)

app = ClientApp()


@app.query()
def forward(message: Message, context: Context) -> Message:
    """Pass a request to the trainer and return its response."""
    socket = context.node_config.get("socket")
    if not isinstance(socket, str):
        raise RuntimeError("the node's configuration names no trainer: --node-config 'socket=\"/path/trainer.sock\"'")
    response = call_trainer(socket, from_record_dict(message.content), timeout_s=message.metadata.ttl)
    return Message(to_record_dict(response), reply_to=message)


def call_trainer(socket: str, payload: bytes, *, timeout_s: float) -> bytes:
    """Return the trainer's response to a request, both as bytes.

    Args:
        socket: path of the trainer's Unix socket.
        payload: the request.
        timeout_s: seconds until the response must be there, > 0.

    Raises:
        RuntimeError: no trainer uses the socket, or it does not respond in time.
    """
    with grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS) as channel:
        call = channel.stream_stream(METHOD)
        try:
            return b"".join(call(split_chunks(payload), timeout=timeout_s))
        except grpc.RpcError as error:
            raise RuntimeError(f"the trainer at {socket} does not respond: {_reason(error)}") from None


def split_chunks(payload: bytes) -> Iterator[bytes]:
    """Yield a message in pieces of 1 MiB."""
    for start in range(0, len(payload), CHUNK_BYTES):
        yield payload[start : start + CHUNK_BYTES]


def _reason(error: grpc.RpcError) -> str:
    code = error.code() if isinstance(error, grpc.Call) else None
    return f"{code.name if code else 'error'}: {error.details() if isinstance(error, grpc.Call) else error}"
