"""``python -m fedlearn.deploy.node_side.supernode``: Flower's SuperNode with shorter waits and a fast start.

It takes the arguments of ``flower-supernode``, and is that program but for three things:

- It waits as `fedlearn.protocol.polling` says instead of three seconds at a time.
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

from fedlearn.deploy.processes import die_with_parent, module_command
from fedlearn.flower.compat import (
    client_app_runner,
    executor,
    forget_exit_handlers,
    retry_parts_after,
    run_superexec,
    run_supernode,
)
from fedlearn.protocol.polling import INITIAL_BACKOFF_S, PollingClock

MESSENGERS = "messengers"  # the first word of this program's second process


class ForkExecutor:
    """Starts the program of each message as a copy of this process."""

    def __init__(self, clock: PollingClock) -> None:
        self.clock = clock
        self.run_clientapp = client_app_runner()
        importlib.import_module("fedlearn.protocol.client_app")

    def launch(self, spec: Any) -> None:
        """Start one; it ends when this process does."""
        self.clock.restart()
        if os.fork() == 0:
            self._carry(spec)

    def reconcile(self) -> None:
        """Let go of those that have ended."""
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _carry(self, spec: Any) -> None:
        code: Any = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            forget_exit_handlers()
            self.run_clientapp(spec.runtime_api_address, spec.token, spec.insecure, parent_pid=spec.parent_pid)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)


def start_supernode(argv: Sequence[str]) -> None:
    """Flower's SuperNode, and beside it the process that messengers are copies of."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9094)
    place, _ = parser.parse_known_args(argv)
    with TemporaryDirectory(prefix="fedlearn-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        shared = ["--superexec-auth-secret-file", str(secret)]
        address = ["--runtime-api-address", f"{place.host}:{place.port}", "--insecure"]
        parent = ["--parent-pid", str(os.getpid())]
        subprocess.Popen(
            [*module_command("fedlearn.deploy.node_side.supernode"), MESSENGERS, *address, *shared, *parent]
        )
        retry_parts_after(INITIAL_BACKOFF_S)
        run_supernode([*argv, "--host", place.host, "--isolation", "process", *shared], PollingClock())


def run_messengers(argv: Sequence[str]) -> None:
    """Flower's SuperExec, which asks the SuperNode for work and starts a copy of itself for each message.

    It ends with the SuperNode, however that ends (on Linux; elsewhere as soon as Flower sees that it is gone).
    """
    die_with_parent()
    if str(os.getppid()) != argv[argv.index("--parent-pid") + 1]:  # it ended before the line above
        return
    clock = PollingClock()
    forks = ForkExecutor(clock)
    retry_parts_after(INITIAL_BACKOFF_S)
    os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "2"  # seconds at most, see `PollingClock`
    run_superexec(argv, clock, executor(forks.launch, forks.reconcile))


if __name__ == "__main__":
    if sys.argv[1:2] == [MESSENGERS]:
        run_messengers(sys.argv[2:])
    else:
        start_supernode(sys.argv[1:])
