"""Change the transfer of the parts of a message in Flower: its waits, and its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlearn.core.spool import Spool, TooLarge
from fedlearn.flower.compat.names import FLOWER
from fedlearn.flower.compat.parts import inflate, pull_contents, push_contents

# errors of malformed parts; a node chooses the content of its parts
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
MAX_BACKOFF_S = 2.0  # longest pause between two attempts to receive a part of a response


def retry_parts_after(seconds: float) -> None:
    """Set the waiting time before another request for missing parts of a message. Flower's default is one second.

    Flower announces a message before it uploads the parts. A receiver that polls quickly asks before the upload has
    ended. With the default, each message waits one second at three places for an upload of milliseconds.

    Args:
        seconds: waiting time before the second request.

    Raises:
        IncompatibleVersion: Flower's functions have no such argument.
    """
    FLOWER.verify("retries")
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects

    for function in (pull_objects, pull_and_inflate_object_from_tree):
        defaults: Any = function.__kwdefaults__
        if "initial_backoff" not in (defaults or {}):
            raise FLOWER.incompatible(f"{function.__module__}:{function.__name__}(initial_backoff=...)")
        defaults["initial_backoff"] = seconds


def receive_on_disk(stall_s: float, *, folder: Path | None, max_bytes: int) -> None:
    """Make Flower's grid keep large responses on disk, send few parts at a time, and give up stalled responses.

    A node announces a response before it uploads the parts. If the node, its messenger or the SuperLink is killed in
    between, Flower waits three minutes for the parts, and meanwhile receives no other response.

    Args:
        stall_s: seconds without a part, > 0. The response then counts as an error.
        folder: folder on a disk; None: the system's folder for temporary files.
        max_bytes: largest number of bytes of a response. A larger or malformed response counts as an error.
    """
    FLOWER.verify("stalls")
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
    from flwr.superlink.grid import http_grid

    def pull_objects(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **more: Any) -> dict[str, bytes]:
        arrived_at = [time.monotonic()]

        def pull(object_id: str) -> bytes:
            try:
                content = pull_object_fn(object_id)
            except ObjectUnavailableError:
                if time.monotonic() - arrived_at[0] > stall_s:
                    raise ObjectPullError(object_id, f"no part for {stall_s:g} s") from None
                raise
            arrived_at[0] = time.monotonic()
            return content

        settings = {"backoff_cap": MAX_BACKOFF_S, **more}
        try:
            contents = pull_contents(object_ids, pull, spool=Spool(folder, max_bytes=max_bytes), **settings)
            contents.message = inflate(object_ids[-1], contents)
            if not isinstance(contents.message, Message):
                raise TypeError(f"it is a {type(contents.message).__name__}, expected a message")
        except ObjectPullError:
            raise
        except (TooLarge, *MALFORMED) as error:  # one node must not end the run of the others
            raise ObjectPullError(object_ids[-1], f"{type(error).__name__}: {error!s:.200}") from error
        return contents

    grid: Any = http_grid
    grid.pull_objects, grid.push_objects = pull_objects, push_contents
    grid.inflate_object_from_contents = lambda object_id, contents: contents.message
