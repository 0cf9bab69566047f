"""``python -m fedlearn.deploy.supernode``: Flower's SuperNode with shorter waits and messengers that start at once.

It takes the arguments of ``flower-supernode``, and is that program but for three things:

- It waits as `fedlearn.flower.pace` says instead of three seconds at a time.
- For each message Flower starts a program that imports Flower anew, 1.3 to 1.7 s of computing. Here each message still
  has a process of its own, but a copy (fork) of one that has imported everything and handled nothing.
- Flower's subprocess mode hands messages to whoever on this machine asks first. Here whoever asks must know a secret
  that is drawn at each start.
"""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

from fedlearn.flower.pace import Clock, look_sooner, sleep_by

MESSENGERS = "messengers"  # the first word of this program's second process
SUPEREXEC = "flwr.supercore.superexec.run_superexec"


class Forks(SubprocessExecutor):
    """Starts the program of each message as a copy of this process."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.run_clientapp = importlib.import_module("flwr.supernode.runtime.run_clientapp").run_clientapp
        importlib.import_module("fedlearn.flower.messenger")

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start one; it ends when this process does."""
        self.clock.begin()
        if os.fork() == 0:
            self._carry(spec)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Let go of those that have ended."""
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _carry(self, spec: ExecutionSpec) -> None:
        code: Any = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            importlib.import_module("flwr.supercore.exit.exit_handler").registered_exit_handlers.clear()
            self.run_clientapp(spec.runtime_api_address, spec.token, spec.insecure, parent_pid=spec.parent_pid)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)


def supernode(words: Sequence[str]) -> None:
    """Flower's SuperNode, and beside it the process that messengers are copies of."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9094)
    place, _ = parser.parse_known_args(words)
    with TemporaryDirectory(prefix="fedlearn-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        shared = ["--superexec-auth-secret-file", str(secret)]
        address = ["--runtime-api-address", f"{place.host}:{place.port}", "--insecure"]
        parent = ["--parent-pid", str(os.getpid())]
        subprocess.Popen([sys.executable, "-m", "fedlearn.deploy.supernode", MESSENGERS, *address, *shared, *parent])
        look_sooner()
        sleep_by(Clock(), "flwr.supernode.start_client_internal")
        sys.argv = ["flower-supernode", *words, "--host", place.host, "--isolation", "process", *shared]
        importlib.import_module("flwr.supernode.cli").flower_supernode()


def messengers(words: Sequence[str]) -> None:
    """Flower's SuperExec, which asks the SuperNode for work and starts a copy of itself for each message."""
    clock = Clock()
    forks = Forks(clock)
    look_sooner()
    sleep_by(clock, SUPEREXEC)
    superexec: Any = importlib.import_module(SUPEREXEC)
    superexec.get_executor = lambda *args, **settings: forks
    os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "2"  # seconds at most, see `Clock`
    sys.argv = ["flower-superexec", *words]
    importlib.import_module("flwr.supercore.cli").flower_superexec()


if __name__ == "__main__":
    if sys.argv[1:2] == [MESSENGERS]:
        messengers(sys.argv[2:])
    else:
        supernode(sys.argv[1:])
