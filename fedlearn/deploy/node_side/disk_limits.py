"""Bound the disk space of a node that a coordinator can use with its requests."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from fedlearn.core.spool import MIN_FREE_BYTES, MIN_FREE_SHARE
from fedlearn.deploy.audit_log import RefusalLimit

COORDINATOR = "coordinator"


def has_room(folder: Path) -> bool:
    """Return whether the disk of a folder has room for the files of another request.

    Each accepted request writes: a line of the audit log, counts, and perhaps client states and a stored response.
    """
    usage = shutil.disk_usage(folder)
    return usage.free >= min(MIN_FREE_BYTES, MIN_FREE_SHARE * usage.total)


class RefusalLines:
    """Decide which refusals get a line in the audit log, and count the others.

    A refusal costs a coordinator nothing, so their number has no other bound.

    Args:
        limit: largest number of lines within a time.
    """

    def __init__(self, limit: RefusalLimit | None = None) -> None:
        self._limit = limit or RefusalLimit()
        self._omitted: Counter[str] = Counter()

    def allows(self, code: str) -> bool:
        """Return whether a refusal with this code gets a line."""
        is_allowed = self._limit.allows(COORDINATOR)
        self._omitted[code] += not is_allowed
        return is_allowed

    def take_omitted(self) -> dict[str, dict[str, int]]:
        """Return the field ``omitted_refusals`` of the next line: number by code; no field if there is none."""
        omitted = {code: count for code, count in self._omitted.items() if count}
        self._omitted.clear()
        return {"omitted_refusals": omitted} if omitted else {}
