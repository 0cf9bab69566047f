"""Start the processes of a federation on this machine, for benchmarks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedlearn.core.command_line import read_settings
from fedlearn.errors import FedlearnError, require
from simulations.benchmarks.speed import BAD_SETTING, DONE, machine

START_TIMEOUT_S = 240.0


def family(process: int) -> list[int]:
    """Return the ids of a process and of all its living child processes."""
    found = [process]
    for member in found:
        with suppress(OSError):
            children = Path(f"/proc/{member}/task/{member}/children").read_text(encoding="ascii")
            found += [int(child) for child in children.split()]
    return found


@contextmanager
def started(folder: Path, name: str, *arguments: str) -> Iterator[int]:
    """Start a command of fedlearn, wait until it is ready, and yield its process id; end it after the block."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output, stderr=output, cwd=folder)
    try:
        ends = time.monotonic() + START_TIMEOUT_S
        while b"\nready\n" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > ends:
                raise FedlearnError(f"{name} did not start: {log.read_text(errors='replace')}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def fedlearn_command(folder: Path, *arguments: str) -> None:
    """Run a command of fedlearn to its end."""
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise FedlearnError(f"{' '.join(arguments)} failed: {done.stdout}{done.stderr}")


def serve_coordinator(folder: Path, stack: ExitStack, names: Sequence[str], *options: str) -> tuple[int, str]:
    """Create keys and start a coordinator; return its process id and address."""
    keys = ("fedlearn.deploy.keys", "create", "keys", "--host", "localhost", "--nodes", *names)
    fedlearn_command(folder, *keys)
    command = ("fedlearn.deploy.coordinator", "--keys", "keys/coordinator", "--port", "0", *options)
    process = stack.enter_context(started(folder, "coordinator", *command))
    return process, (folder / "coordinator/address").read_text(encoding="ascii").strip()


def run_benchmark(
    argv: Sequence[str] | None,
    defaults: Mapping[str, int],
    help_text: str,
    measure: Callable[[Mapping[str, int]], int],
    *,
    may_be_zero: Sequence[str] = (),
) -> int:
    """Read the settings of a benchmark, print the machine, and return the exit code of the measurement.

    Args:
        argv: words of the command line; None takes them from `sys.argv`.
        defaults: the settings, which are whole numbers.
        help_text: text of ``--help``.
        measure: measures with all settings, prints the result, and returns the exit code.
        may_be_zero: settings with 0 as least value; others have 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text)
        return DONE
    try:
        settings: dict[str, int] = {**defaults, **read_settings(arguments, defaults)}
        for setting, value in settings.items():
            least = 0 if setting in may_be_zero else 1
            is_valid = type(value) is int and value >= least
            require(is_valid, setting, value, f"a whole number >= {least}", f"{setting}=10")
    except FedlearnError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_SETTING
    sys.stdout.write(f"{machine()}\n")
    return measure(settings)
