"""Run Flower's SuperExec, which starts a process for each run.

The command is ``python -m fedlearn.deploy.coordinator_side.superexec``, with the arguments of ``flower-superexec``.
Flower passes the token of a run as an argument of the process, which all users of the machine can read. Here the
process reads the token from its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlearn.deploy.coordinator_side.environment import STATE_ENV
from fedlearn.deploy.coordinator_side.run_recovery import PROCESSES_FILE
from fedlearn.deploy.log_format import stamp_output
from fedlearn.deploy.processes import die_with_parent, module_command
from fedlearn.flower.compat.programs import executor, run_serverapp, run_superexec, serverapp_arguments

RUN = "run"  # first argument of the process of a run


class RunExecutor:
    """Start a process for each run, and reap the processes that have ended.

    Each poll writes the ids of the living processes to a file. Its age shows whether the SuperExec works.

    Args:
        state: state folder of the coordinator.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self._processes: list[subprocess.Popen[bytes]] = []

    def launch(self, spec: Any) -> None:
        """Start the process of a run; it ends at the latest with this process."""
        command = [*module_command("fedlearn.deploy.coordinator_side.superexec"), RUN, *serverapp_arguments(spec)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=die_with_parent)
        assert process.stdin is not None
        process.stdin.write(f"{spec.token}\n".encode())
        process.stdin.close()
        self._processes.append(process)
        self._write()

    def reconcile(self) -> None:
        """Reap the processes that have ended."""
        self._processes = [process for process in self._processes if process.poll() is None]
        self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk must not end runs
            draft = self.state / f"{PROCESSES_FILE}.tmp"
            draft.write_text(json.dumps([process.pid for process in self._processes]), encoding="ascii")
            draft.replace(self.state / PROCESSES_FILE)


def main() -> None:
    """Run the SuperExec, or the process of a run, with the arguments of this process."""
    stamp_output()  # in the log file; Flower copies the output of a run before it reaches the stamped stream
    if sys.argv[1:2] == [RUN]:
        run_serverapp(sys.argv[2:], token=sys.stdin.readline().strip())
    else:
        runs = RunExecutor(Path(os.environ[STATE_ENV]))
        run_superexec(sys.argv[1:], executor(runs.launch, runs.reconcile))


if __name__ == "__main__":
    main()
