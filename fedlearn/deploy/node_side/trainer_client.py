"""Call the trainer of a node through its Unix socket, and wait for a trainer that starts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlearn.core.spool import Spool
from fedlearn.core.tensor_bytes import Buffer, num_bytes

METHOD = "/fedlearn.Trainer/Call"
CHUNK_BYTES = 2**20  # bytes in one gRPC message, below the limit of gRPC
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
START_TIMEOUT_S = 10.0  # seconds to wait for a trainer that starts, before the coordinator gets an error
PROBE_TIMEOUT_S = 3.0  # seconds for the answer to a check


class TrainerUnavailable(Exception):
    """Report a trainer that does not respond."""


class TrainerClient:
    """Send requests to a trainer.

    Args:
        socket: Unix socket of the trainer.
        folder: folder on a disk for large responses; None: the system's folder for temporary files.
    """

    def __init__(self, socket: Path, folder: Path | None = None) -> None:
        self.socket, self.folder = socket, folder

    def call(self, payload: Sequence[Buffer], *, timeout_s: float) -> memoryview:
        """Send a request to the trainer and return its response.

        A trainer that ends during the request gets it again. Its stored responses make that safe.

        Args:
            payload: packed request, in parts.
            timeout_s: seconds to wait for the response, > 0.

        Raises:
            TrainerUnavailable: No trainer used the socket for `START_TIMEOUT_S`, or it does not respond in time.
        """
        ends, waits_until = time.monotonic() + timeout_s, time.monotonic() + START_TIMEOUT_S
        while True:
            start = time.monotonic()
            try:
                return self._call(payload, ends - start)
            except grpc.RpcError as error:
                now = time.monotonic()
                if now - start > START_TIMEOUT_S:  # it worked on the request before it ended
                    waits_until = now + START_TIMEOUT_S
                is_transient = _code(error) == grpc.StatusCode.UNAVAILABLE
                if not is_transient or now + 0.5 > min(ends, waits_until):
                    raise TrainerUnavailable(
                        f"the trainer at {self.socket} does not respond: {_reason(error)}"
                    ) from None
                time.sleep(0.5)

    def problem(self) -> str:
        """Return the problem that gRPC's standard health service reports for the trainer; empty if it works."""
        with grpc.insecure_channel(f"unix:{self.socket}", options=CHANNEL_OPTIONS) as channel:
            request = health_pb2.HealthCheckRequest()
            try:
                response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PROBE_TIMEOUT_S)
            except grpc.RpcError as error:
                is_absent = _code(error) == grpc.StatusCode.UNAVAILABLE
                return "it does not listen at its socket" if is_absent else "it does not answer"
        return "" if response.status == health_pb2.HealthCheckResponse.SERVING else "it does not serve requests"

    def _call(self, payload: Sequence[Buffer], timeout_s: float) -> memoryview:
        response = Spool(self.folder)
        with grpc.insecure_channel(f"unix:{self.socket}", options=CHANNEL_OPTIONS) as channel:
            for chunk in channel.stream_stream(METHOD)(split_chunks(payload), timeout=timeout_s):
                response.write(chunk)
        return response.view()


def split_chunks(payload: Sequence[Buffer]) -> Iterator[bytes]:
    """Yield the bytes of a message in chunks of at most `CHUNK_BYTES`."""
    if num_bytes(payload) <= CHUNK_BYTES:
        yield b"".join(payload)
        return
    for part in payload:
        view = memoryview(part)
        for start in range(0, len(view), CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.Call) else None


def _reason(error: grpc.RpcError) -> str:
    code = _code(error)
    return f"{code.name if code else 'error'}: {error.details() if isinstance(error, grpc.Call) else error}"
