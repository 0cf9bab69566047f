"""Limit the responses that a client of a coordinator reads. A hostile coordinator could otherwise fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx

MAX_RESPONSE_BYTES = 64 * 2**20  # bytes of a response; Flower divides a message into parts of 5 MiB


def limit_responses(client: httpx.Client, max_bytes: int = MAX_RESPONSE_BYTES) -> None:
    """Make a client refuse redirections, and compressed or large responses.

    A redirection would let the coordinator choose another machine, perhaps in the network of the node.

    Args:
        client: client of a coordinator.
        max_bytes: largest size of a response.
    """

    def check(response: httpx.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx.RemoteProtocolError("the response is compressed", request=response.request)
        response.stream = LimitedStream(response.stream, max_bytes)

    client.follow_redirects = False
    client.event_hooks = {"response": [check]}


class LimitedStream(httpx.SyncByteStream):
    """A response that ends with an error after a number of bytes.

    Args:
        stream: the response.
        max_bytes: largest number of bytes.
    """

    def __init__(self, stream: Any, max_bytes: int) -> None:
        self._stream, self.max_bytes = stream, max_bytes

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if size > self.max_bytes:
                raise httpx.RemoteProtocolError(f"the response has more than {self.max_bytes} bytes")
            yield part

    def close(self) -> None:
        """Close the response, also before its end."""
        self._stream.close()
