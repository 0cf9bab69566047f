"""Read and write lists of client ids, for example ``0-2,7``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from fedlearn.core.records import ClientId

MAX_CLIENTS = 1_000_000  # clients of one node


def parse_client_ids(text: str) -> tuple[ClientId, ...]:
    """Return the client ids in a text, ascending.

    >>> parse_client_ids("7,0-2")
    (0, 1, 2, 7)

    Raises:
        ValueError: The text is not a list of ids and ranges, or names an id twice.
    """
    ids: list[ClientId] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?", part, re.ASCII)
        if match is None:
            raise ValueError(f"{part!r} is not an id or a range of ids")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MAX_CLIENTS - len(ids):
            raise ValueError(f"{part!r} is not a range of at most {MAX_CLIENTS} ids")
        ids += range(first, last + 1)
    if len(set(ids)) < len(ids):
        raise ValueError(f"{text!r} has an id twice")
    return tuple(sorted(ids))


def format_client_ids(clients: Iterable[ClientId]) -> str:
    """Return client ids as text, which `parse_client_ids` reads; empty for no client.

    >>> format_client_ids([7, 0, 1, 2])
    '0-2,7'
    """
    runs = [[id for _, id in run] for _, run in groupby(enumerate(sorted(clients)), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
