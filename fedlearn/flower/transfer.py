"""Continue a transfer after its connection was cut, with the part that was in progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

CUT_TIMEOUT_S = 60.0  # seconds without a connection after which a transfer fails
RETRY_INTERVAL_S = 0.5


def continue_after_cuts(
    call: Callable[[Any], Any], *, timeout_s: float = CUT_TIMEOUT_S, sleep: Callable[[float], None] = time.sleep
) -> Callable[[Any], Any]:
    """Return a function that repeats a call while its connection is cut.

    A model of 3 GiB has 600 parts. Without this function, a cut in the last part repeats all parts.

    Args:
        call: call of a server without an effect there, such as the download of a part.
        timeout_s: seconds after which the error is raised.
        sleep: function that waits for a number of seconds.
    """

    def repeat(request: Any) -> Any:
        ends = time.monotonic() + timeout_s
        while True:
            try:
                return call(request)
            except httpx.TransportError:
                if time.monotonic() >= ends:
                    raise
                sleep(RETRY_INTERVAL_S)

    return repeat


def push_after_cuts(
    call: Callable[[Any], Any], *, timeout_s: float = CUT_TIMEOUT_S, sleep: Callable[[float], None] = time.sleep
) -> Callable[[Any], Any]:
    """Return a function that repeats the upload of a part while its connection is cut.

    The SuperLink may have stored the part before the cut. It then refuses the part at the second attempt, so such a
    refusal counts as stored. A message cannot be announced a second time once the receiver knows it.

    Args:
        call: upload of a part.
        timeout_s: seconds after which the error is raised.
        sleep: function that waits for a number of seconds.
    """

    def push(request: Any) -> Any:
        num_calls = 0

        def counted(request: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return call(request)

        response = continue_after_cuts(counted, timeout_s=timeout_s, sleep=sleep)(request)
        response.stored = response.stored or num_calls > 1
        return response

    return push
