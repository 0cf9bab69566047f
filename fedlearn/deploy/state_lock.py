"""Lock the state folder of a coordinator or a node, so that no second process uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedlearn.advice import option
from fedlearn.errors import FedlearnError

LOCK_FILE = ".lock"


class StateInUse(FedlearnError):
    """Report a state folder that another process uses."""


@contextmanager
def locked_state(state: Path, owner: str) -> Iterator[None]:
    """Create a state folder for this user only, and lock it during the block.

    Args:
        state: state folder.
        owner: kind of the process, for the error: ``coordinator`` or ``node``.

    Raises:
        StateInUse: Another process uses the folder.
    """
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)  # an earlier version may have created it for all users
    lock = FileLock(state / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        problem = f"--state {state} is in use by another {owner}, which still runs"
        expected = f"a folder that no other {owner} uses"
        fix = option("--state", state.with_name(f"{state.name}-2"))
        raise StateInUse(f"{problem}\n  expected  {expected}\n  try       {fix}") from None
    with lock:
        yield
