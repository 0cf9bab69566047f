"""One file over HTTP, from where an earlier try ended.

Reference: Fielding, Nottingham, Reschke, *HTTP Semantics*, RFC 9110, sections 13.1.5 (If-Range) and 14 (Range).
"""

from __future__ import annotations

import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fedlearn.data.download.catalog import file_problem

SILENCE_S = 30.0  # give up on a connection that says nothing for so long
DEADLINE_S = 300.0  # and on any one try that takes so long
CHUNK_BYTES = 1 << 16  # bytes
ProgressCallback = Callable[[int, int | None], None]  # bytes so far, and of how many, where that is known


class FetchError(Exception):
    """A file could not be brought here; trying again may help."""


class PermanentFetchError(FetchError):
    """A file could not be brought here, and trying again will not help."""


@dataclass(frozen=True)
class Download:
    """A file on its way.

    Args:
        url: of the file.
        target: where it grows; its folder is made if absent.
        checksum: of the whole.
    """

    url: str
    target: Path
    checksum: str

    def attempt(self) -> None:
        """One try, from the first byte that is missing if the server still has the version that the try before saw.

        *Guarantees*: after it returns the target has the checksum. What a failed try leaves is kept only if the server
        told its version (a strong ETag, or when it was modified); what has the wrong checksum is not.

        Raises:
            FetchError: an error status, a body shorter than announced, silence, too long a wait, another content.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file_problem(self.target, self.checksum):
                self._bring()
            if why := file_problem(self.target, self.checksum):
                self._forget()
                raise FetchError(why)
        except BaseException:  # Ctrl-C too
            if not self._version.exists():
                self.target.unlink(missing_ok=True)
            raise
        self._version.unlink(missing_ok=True)

    @property
    def _version(self) -> Path:
        return self.target.with_name(f"{self.target.name}.version")

    def _forget(self) -> None:
        self._version.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)

    def _bring(self) -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url, headers=self._asks()), timeout=SILENCE_S
            ) as reply:
                self._receive(reply)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the file is shorter now than what is here of it
                self._forget()
            passing = error.code >= 500 or error.code in (408, 416, 429)
            raise (FetchError if passing else PermanentFetchError)(f"HTTP {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise FetchError(str(error.reason)) from error
        except (HTTPException, OSError) as error:
            raise FetchError(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            raise PermanentFetchError(str(error)) from error

    def _asks(self) -> Mapping[str, str]:
        if not (self.target.exists() and self._version.exists()):
            return {}
        # If-Range: a server that has another version by now, or knows no ranges, sends all of it
        return {
            "Range": f"bytes={self.target.stat().st_size}-",
            "If-Range": self._version.read_text(encoding="latin-1"),
        }

    def _receive(self, reply: Any) -> None:
        done = self._start(reply)
        announced = getattr(reply, "length", None)
        total = None if announced is None else done + announced
        deadline = time.monotonic() + DEADLINE_S
        with self.target.open("ab" if done else "wb") as file, progress(self.target.name) as show:
            if not done:
                self._note(reply)
            while piece := reply.read1(CHUNK_BYTES):
                file.write(piece)
                done += len(piece)
                show(done, total)
                if time.monotonic() > deadline:
                    raise FetchError(f"took longer than {DEADLINE_S:g} s")
        if total is not None and done < total:
            raise FetchError(f"the body was cut off, {total - done} bytes short")

    def _start(self, reply: Any) -> int:
        """Where what the server sends begins."""
        if getattr(reply, "status", None) != 206:
            return 0
        said = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
        here = self.target.stat().st_size
        if said and int(said[1]) == here:
            return here
        self._forget()
        raise FetchError(f"the server sent another part than the one that was asked for, from byte {here}")

    def _note(self, reply: Any) -> None:
        """Keep the version, if there is one by which to ask for the rest of it."""
        self._version.unlink(missing_ok=True)
        tag = reply.headers.get("ETag", "")
        version = tag if tag.startswith('"') else reply.headers.get("Last-Modified")
        if version:
            self._version.write_text(version, encoding="latin-1")


@contextmanager
def progress(label: str) -> Iterator[ProgressCallback]:
    """Return a function that shows the state of a transfer; it draws and loads rich on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
