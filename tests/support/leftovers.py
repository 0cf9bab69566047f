"""Report threads that keep Python alive, processes and files that tests leave; end them, and fail the run.

A process belongs to the tests if it is a descendant, or if it inherited an environment variable of the session. So
processes without a living parent are found, too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import thread as futures
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

MARK = "FEDLEARN_TEST_SESSION"
LIMIT_S = 30.0  # limit for processes and threads that are about to end
SOURCES = {".py", ".pyc", ".md", ".toml", ".yaml", ".yml"}  # developers may write these files while tests run
CACHES = {".git", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache", ".mypy_cache", ".import_linter_cache"}
HELPERS = ("multiprocessing.resource_tracker",)  # Python's own; it ends with its parent process
SHARED = Path("/dev/shm")


def pytest_configure(config):
    config.pluginmanager.register(Leftovers(config.rootpath), "leftovers of the tests")


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_tests(pytestconfig):
    """Run the check last: this fixture is set up first, and therefore torn down last."""
    yield
    pytestconfig.pluginmanager.get_plugin("leftovers of the tests").check()


class Leftovers:
    """Threads and files that exist before the tests, in each process that runs tests.

    Args:
        root: folder of the repository. Tests must not leave files there, in the working directory or in shared memory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.token = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        os.environ[MARK] = self.token
        self.threads = set(threading.enumerate())
        self.files = self._files()
        self.strays: list[str] = []
        self.status = 0

    def check(self) -> None:
        """Fail if a process or a thread is left, and end it."""
        left = remaining_after_wait(lambda: [*self._processes(), *self._threads()])
        end(self._processes())
        if left:
            pytest.fail("left by the tests:\n  " + "\n  ".join(map(str, left)), pytrace=False)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):  # one check for all workers, after they have finished
            self.strays = remaining_after_wait(lambda: sorted(self._files() - self.files))
            if self.strays and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self.status = int(session.exitstatus)

    def pytest_terminal_summary(self, terminalreporter):
        if self.strays:
            terminalreporter.section("files left by the tests", sep="=", red=True)
            for path in self.strays:
                terminalreporter.line(f"ERROR {path}")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config):
        if self._threads() and not hasattr(config, "workerinput"):  # Python would wait for them forever
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)

    def _threads(self) -> list[str]:
        left = [each for each in threading.enumerate() if each.is_alive() and not each.daemon]
        return [f"thread {each.name}" for each in left if each not in self.threads and not _is_idle(each)]

    def _processes(self) -> list[Process]:
        everyone = [process for folder in Path("/proc").glob("[0-9]*") if (process := Process.read(folder))]
        family = {os.getpid()}
        while grown := {each.pid for each in everyone if each.parent in family} - family:
            family |= grown
        wanted = f"{MARK}={self.token}".encode()
        ours = [each for each in everyone if each.pid in family or wanted in each.environment]
        return [each for each in ours if each.pid != os.getpid() and not any(word in each.command for word in HELPERS)]

    def _files(self) -> set[str]:
        found = {str(path) for path in (*_below(self.root), *Path.cwd().iterdir()) if path.suffix not in SOURCES}
        found -= {str(Path.cwd() / name) for name in CACHES}
        if SHARED.is_dir():
            used = _in_use()
            found |= {str(path) for path in SHARED.iterdir() if _is_ours(path) and str(path) not in used}
        return found


@dataclass(frozen=True)
class Process:
    """A process with its parent, command line and environment, from ``/proc``."""

    pid: int
    parent: int
    command: str
    environment: list[bytes]

    @classmethod
    def read(cls, folder: Path) -> Process | None:
        """Read a process from its folder in ``/proc``; return None if it has ended."""
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = b" ".join(_words(folder / "cmdline")).decode("utf-8", "replace").strip()
            if state != "Z":
                return cls(int(folder.name), int(parent), command, _words(folder / "environ"))
        return None

    def __str__(self) -> str:
        tests = [word.decode() for word in self.environment if word.startswith(b"PYTEST_CURRENT_TEST=")]
        return f"process {self.pid} of {tests[0].partition('=')[2] if tests else 'a test'}: {self.command[:300]}"


def remaining_after_wait(look: Callable[[], list], limit_s: float = LIMIT_S) -> list:
    """Return the remaining items after a wait, at once if there are none."""
    until = time.monotonic() + limit_s
    while (found := look()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def end(processes: Iterable[Process]) -> None:
    """Send SIGKILL to these processes."""
    for process in processes:
        with suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)


def _is_idle(thread: threading.Thread) -> bool:
    """Return whether an idle worker of a pool runs the thread; Python ends such threads at exit."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == "_worker" and frame.f_code.co_filename == futures.__file__


def _words(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\0")


def _below(root: Path) -> Iterable[Path]:
    for place, names, files in os.walk(root):
        names[:] = [name for name in names if name not in CACHES and not name.endswith(".egg-info")]
        yield from (Path(place, name) for name in files)


def _is_ours(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_uid == os.getuid()
    return False


def _in_use() -> set[str]:
    """Return the files of shared memory that another running process has mapped or open."""
    used = set()
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            maps = (folder / "maps").read_text().splitlines()
            used |= {str(SHARED) + line.partition(f" {SHARED}")[2] for line in maps}
        with suppress(OSError):
            for link in (folder / "fd").iterdir():
                with suppress(OSError):
                    used.add(os.readlink(link))
    return used
