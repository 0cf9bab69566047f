"""The Flower `ClientApp` of a node: a messenger between Flower and the node's trainer, and nothing else.

Flower starts a process for each message and brings the code that runs in it from the coordinator. Therefore this
process gets neither data nor a framework: it hands the request's bytes to the trainer, a process of the node's operator
that answers on a Unix socket, and takes the answer's bytes back. The node's configuration names the socket:
``--node-config 'socket="/run/fedlearn/trainer.sock"'``.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlearn.flower.envelope import disclose, enclose

METHOD = "/fedlearn.Trainer/Ask"
PART = 2**20  # bytes in one gRPC message: a parcel of any size passes below gRPC's limits
OPTIONS = (("grpc.enable_http_proxy", 0),)

app = ClientApp()


@app.query()
def forward(message: Message, context: Context) -> Message:
    """Hand a request to the trainer and bring back its answer."""
    socket = context.node_config.get("socket")
    if not isinstance(socket, str):
        raise RuntimeError("the node's configuration names no trainer: --node-config 'socket=\"/path/trainer.sock\"'")
    answer = ask(socket, disclose(message.content), timeout=message.metadata.ttl)
    return Message(enclose(answer), reply_to=message)


def ask(socket: str, payload: bytes, *, timeout: float) -> bytes:
    """The trainer's answer to a request.

    Args:
        socket: path of the trainer's Unix socket.
        payload: the request.
        timeout: seconds until the answer must be there.

    Raises:
        RuntimeError: nobody answers at the socket, or not in time.
    """
    with grpc.insecure_channel(f"unix:{socket}", options=OPTIONS) as channel:
        call = channel.stream_stream(METHOD)
        try:
            return b"".join(call(parts(payload), timeout=timeout))
        except grpc.RpcError as error:
            raise RuntimeError(f"the trainer at {socket} gave no answer: {_reason(error)}") from None


def parts(payload: bytes) -> Iterator[bytes]:
    """A parcel in pieces of 1 MiB."""
    for start in range(0, len(payload), PART):
        yield payload[start : start + PART]


def _reason(error: grpc.RpcError) -> str:
    code = error.code() if isinstance(error, grpc.Call) else None
    return f"{code.name if code else 'error'}: {error.details() if isinstance(error, grpc.Call) else error}"
