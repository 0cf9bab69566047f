"""Call the trainer of a node through its Unix socket, and wait for a trainer that starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
    """

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def call(self, payload: bytes, *, timeout_s: float) -> bytes:
        """Send a request to the trainer and return its response.

        A trainer that ends during the request gets it again. Its stored responses make that safe.

        Args:
            payload: packed request.
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

    def _call(self, payload: bytes, timeout_s: float) -> bytes:
        with grpc.insecure_channel(f"unix:{self.socket}", options=CHANNEL_OPTIONS) as channel:
            return b"".join(channel.stream_stream(METHOD)(split_chunks(payload), timeout=timeout_s))


def split_chunks(payload: bytes) -> Iterator[bytes]:
    """Yield the bytes of a message in chunks of `CHUNK_BYTES`."""
    for start in range(0, len(payload), CHUNK_BYTES):
        yield payload[start : start + CHUNK_BYTES]


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.Call) else None


def _reason(error: grpc.RpcError) -> str:
    code = _code(error)
    return f"{code.name if code else 'error'}: {error.details() if isinstance(error, grpc.Call) else error}"
