"""Run Flower's SuperNode with shorter waits: ``python -m fedlearn.deploy.node_side.supernode``.

It has the arguments of ``flower-supernode``, and differs from that program in three points:

- It waits as long as `fedlearn.protocol.polling` computes, instead of three seconds.
- Flower starts a program for each message, and each program imports Flower (1.3 to 1.7 s of processor time). Here each
  message has a separate process too, a fork of a process that has imported all modules and handled no message.
- Flower's subprocess mode gives a message to the first process of this machine that asks for it. Here a process must
  know a secret, which is new at each start.
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

MESSENGERS = "messengers"  # first argument of the second process of this program


class ForkExecutor:
    """Start a fork of this process for each message.

    Args:
        clock: clock of the polls, which restarts with each message.
    """

    def __init__(self, clock: PollingClock) -> None:
        self.clock = clock
        self.run_clientapp = client_app_runner()
        importlib.import_module("fedlearn.protocol.client_app")

    def launch(self, spec: Any) -> None:
        """Start a process for one message. It ends at the latest with this process."""
        self.clock.restart()
        parent = os.getpid()
        if os.fork() == 0:
            die_with_parent()  # a fork does not inherit the signal
            if os.getppid() != parent:  # the parent ended before prctl
                os._exit(1)
            self._handle_message(spec)

    def reconcile(self) -> None:
        """Reap the processes that have ended."""
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _handle_message(self, spec: Any) -> None:
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
    """Run Flower's SuperNode, and start the process that forks the messengers.

    Args:
        argv: arguments of ``flower-supernode``.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9094)
    options, _ = parser.parse_known_args(argv)
    with TemporaryDirectory(prefix="fedlearn-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        shared = ["--superexec-auth-secret-file", str(secret)]
        address = ["--runtime-api-address", f"{options.host}:{options.port}", "--insecure"]
        parent = ["--parent-pid", str(os.getpid())]
        subprocess.Popen(
            [*module_command("fedlearn.deploy.node_side.supernode"), MESSENGERS, *address, *shared, *parent]
        )
        retry_parts_after(INITIAL_BACKOFF_S)
        run_supernode([*argv, "--host", options.host, "--isolation", "process", *shared], PollingClock())


def run_messengers(argv: Sequence[str]) -> None:
    """Run Flower's SuperExec, which polls the SuperNode for messages and forks a process for each of them.

    It ends with the SuperNode, on Linux even after SIGKILL. On other systems it ends when Flower notices that the
    SuperNode has ended.

    Args:
        argv: arguments of ``flower-superexec``, with ``--parent-pid``.
    """
    die_with_parent()
    if str(os.getppid()) != argv[argv.index("--parent-pid") + 1]:  # the SuperNode ended before prctl
        return
    clock = PollingClock()
    forks = ForkExecutor(clock)
    retry_parts_after(INITIAL_BACKOFF_S)
    os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "2"  # seconds; the longest pause of `PollingClock`
    run_superexec(argv, clock, executor(forks.launch, forks.reconcile))


if __name__ == "__main__":
    if sys.argv[1:2] == [MESSENGERS]:
        run_messengers(sys.argv[2:])
    else:
        start_supernode(sys.argv[1:])
