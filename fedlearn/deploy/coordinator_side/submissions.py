"""Remember who submitted each run, in a file per run of the coordinator's state folder."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedlearn.core.private_files import write_private_json
from fedlearn.core.serialization import WireError, read_fields

SUBMISSIONS_FOLDER = "submissions"  # in the coordinator's state folder
STOP_SUFFIX = ".stop"  # an empty file with this suffix asks a run to stop
STOP_INTERVAL_S = 0.2  # seconds between two looks for this file


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request that started a run of Flower.

    Attributes:
        number: Flower's id of the run.
        name: name of the run, equal in all its parts; empty for a resumed run, whose folder has it.
        person: name of the person who submitted it.
        do: ``run`` or ``resume``.
        folder: run folder at the coordinator, as submitted.
    """

    number: int
    name: str
    person: str
    do: str
    folder: str


class Submissions:
    """The submissions in a state folder.

    Args:
        state: state folder of the coordinator.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / SUBMISSIONS_FOLDER

    def add(self, submission: Submission) -> None:
        """Store a submission under the number of its run."""
        write_private_json(self.folder / f"{submission.number}.json", asdict(submission))

    def find(self, number: int) -> Submission | None:
        """Return the submission of a run; None if there is none."""
        try:
            content = json.loads((self.folder / f"{int(number)}.json").read_text(encoding="utf-8"))
            return Submission(**read_fields(content, number=int, name=str, person=str, do=str, folder=str))
        except (OSError, ValueError, WireError):
            return None

    def request_stop(self, number: int) -> None:
        """Ask a run to stop after its round. Its process looks for this file several times per second."""
        (self.folder / f"{int(number)}{STOP_SUFFIX}").touch()

    def is_stop_requested(self, number: int) -> bool:
        """Return whether a person has asked a run to stop after its round."""
        return (self.folder / f"{int(number)}{STOP_SUFFIX}").exists()


@contextmanager
def stoppable(submissions: Submissions, number: int, *, interval_s: float = STOP_INTERVAL_S) -> Iterator[None]:
    """Interrupt this process, as Ctrl-C does, when a stop of its run is requested during the block.

    Args:
        submissions: submissions of the coordinator.
        number: Flower's id of the run.
        interval_s: seconds between two looks.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(interval_s):
            if submissions.is_stop_requested(number):
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch, daemon=True, name="stop request")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def new_run_name() -> str:
    """Return a new name of a run: its start in UTC and random digits, such as ``20260301-101500-3f9c1a``."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
