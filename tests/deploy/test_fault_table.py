"""Each fault of operation strikes a run at five random moments. The test prints a table of what is seen."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pytest
from fault_injection import COORDINATOR_MACHINE, NODE_MACHINE, LoadMeter, Recorder, processes_of, send

from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.submit import compose_request

if sys.platform != "linux":
    pytest.skip("finds the processes in /proc", allow_module_level=True)

NUM_STRIKES, NUM_ROUNDS = 5, 8
MAX_SILENCE_S = 15.0
MAX_DELAY_S = 4.0  # a strike comes at a random moment of this time after a completed round
LIMIT_S = 600.0
NODE = "node1"
pytestmark = [pytest.mark.slow, pytest.mark.endurance]


@dataclass(frozen=True)
class Fault:
    """A fault, and its repair after some seconds.

    Attributes:
        name: name in the table.
        parts: kinds of processes that are struck, the parents first.
        at_node: True for processes of one node.
        number: signal.
        absent_s: seconds until a stopped process continues, or until the init system restarts a killed one.
        words: settings of the run.
        num_rounds: rounds of the run; without the node they are short, so more of them are needed for all strikes.
        is_equal: True if the run must end with the parameters of an undisturbed run, without a failure.
    """

    name: str
    parts: tuple[str, ...]
    at_node: bool = False
    number: int = signal.SIGKILL
    absent_s: float = 0.0
    words: tuple[str, ...] = ()
    num_rounds: int = NUM_ROUNDS
    is_equal: bool = True

    def strike(self, federation) -> list[int]:
        """Send the signal, and return the ids of the processes."""
        folder = federation.folder / NODE if self.at_node else federation.folder
        struck = processes_of(folder, *self.parts)
        send(self.number, struck)
        return struck


SHORT = ("engine.deadline=10", "max_failures=1.0")  # the run continues without the node
FAULTS = (
    Fault("SuperLink killed", ("SuperLink",)),
    Fault("SuperExec killed", ("SuperExec",)),
    Fault("process of the run killed", ("run",)),
    Fault("coordinator killed, back after 6 s", ("coordinator",), absent_s=6.0),
    Fault("machine of the coordinator reboots, back after 12 s", COORDINATOR_MACHINE, absent_s=12.0),
    Fault("messenger killed", ("messenger",), at_node=True),
    Fault("trainer killed", ("trainer",), at_node=True),
    Fault("node killed, back after 4 s", ("node",), at_node=True, absent_s=4.0),
    Fault("machine of a node loses power, back after 3 s", NODE_MACHINE, at_node=True, absent_s=3.0),
    Fault("SuperLink stopped for 15 s", ("SuperLink",), number=signal.SIGSTOP, absent_s=15.0),
    Fault("messenger stopped for 15 s", ("messenger",), at_node=True, number=signal.SIGSTOP, absent_s=15.0),
    Fault("trainer stopped for 15 s", ("trainer",), at_node=True, number=signal.SIGSTOP, absent_s=15.0),
    Fault(
        "messenger stopped for 25 s, engine.deadline=10",
        ("messenger",),
        at_node=True,
        number=signal.SIGSTOP,
        absent_s=25.0,
        words=SHORT,
        num_rounds=20,
        is_equal=False,
    ),
    Fault(
        "trainer stopped for 25 s, engine.deadline=10",
        ("trainer",),
        at_node=True,
        number=signal.SIGSTOP,
        absent_s=25.0,
        words=SHORT,
        num_rounds=20,
        is_equal=False,
    ),
)


class Strikes:
    """Strike a run at random moments, repair, and measure the time to the next completed round.

    Args:
        federation: the federation.
        fault: the fault.
        recorder: output of the follower.
        seed: seed of the moments.
    """

    def __init__(self, federation, fault: Fault, recorder: Recorder, seed: int) -> None:
        self.federation, self.fault, self.recorder = federation, fault, recorder
        self._draws = random.Random(seed)
        self.recoveries: list[float] = []
        self.num_strikes = 0
        self._struck: list[int] = []
        self._struck_at = self._repair_at = self._due = 0.0
        self._ends, self._num_rounds = time.monotonic() + LIMIT_S, 0

    def meanwhile(self) -> None:
        """Send the signal, repair the processes, and measure; the follower calls this several times per second."""
        now, num_rounds = time.monotonic(), len(self.federation.found(self.recorder.path.stem).lines)
        if now > self._ends:
            self._ends = float("inf")
            os.kill(os.getpid(), signal.SIGINT)
        if self._struck_at and now >= self._repair_at:
            self._struck = []
        if not self._struck:
            self.recorder.restart_exited(self.federation.rehearsal)
        if self._struck_at and not self._struck and num_rounds > self._num_rounds:
            self.recoveries.append(now - self._struck_at)
            self._struck_at = 0.0
            self._due = now + self._draws.uniform(0.0, MAX_DELAY_S)
        elif not self._struck_at and num_rounds and now >= self._due and self.num_strikes < NUM_STRIKES:
            self._strike(now, num_rounds)

    def _strike(self, now: float, num_rounds: int) -> None:
        self._struck = self.fault.strike(self.federation)
        if self._struck:  # a process may be absent at this moment
            self.num_strikes += 1
            if self.fault.number == signal.SIGSTOP:  # a follower that waits for a stopped SuperLink calls nothing
                threading.Timer(self.fault.absent_s, send, (signal.SIGCONT, self._struck)).start()
            self._struck_at, self._repair_at, self._num_rounds = now, now + self.fault.absent_s, num_rounds
            self.recorder.note(f"{self.fault.name} ({len(self._struck)} processes)\n")


@pytest.fixture(scope="module")
def table():
    """Collect the rows, and print the table at the end."""
    rows: list[str] = []
    yield rows
    head = "| fault, five random moments | exit code | rounds | recovery s, median (longest) | longest silence s "
    head += "(without other programs) | failures | same model |\n|---|---|---|---|---|---|---|"
    sys.__stdout__.write("\n".join(["", head, *rows, ""]))


@pytest.fixture(scope="module")
def undisturbed_sha(tmp_path_factory):
    from tests.deploy.test_deployment import sha_of_simulation

    return sha_of_simulation(tmp_path_factory.mktemp("undisturbed") / "run", f"rounds={NUM_ROUNDS}")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_run_lives_through_each_fault_at_five_random_moments(
    federation, tmp_path, monkeypatch, table, undisturbed_sha, fault
):
    number = FAULTS.index(fault)
    wait_for_nodes(federation)  # the last fault may have stopped one
    recorder = Recorder(tmp_path / f"fault{number}.log")
    strikes = Strikes(federation, fault, recorder, seed=number)
    waits = ("engine.join_timeout=180", "engine.deadline=180", "max_failures=0.0")
    given = {word.partition("=")[0] for word in fault.words}
    words = [
        f"rounds={fault.num_rounds}",
        *fault.words,
        *(word for word in waits if word.partition("=")[0] not in given),
    ]
    code, load = follow(federation, recorder, strikes.meanwhile, monkeypatch, words)
    run = federation.found(recorder.path.stem, code, recorder.getvalue())
    failures = [failure for line in run.lines for failure in line["failures"]]
    is_same = code == 0 and run.summary["parameters_sha256"] == undisturbed_sha
    quiet_s = max(load.quiet_s(*silence) for silence in recorder.silences)
    recovered = f"{median(strikes.recoveries or [0.0]):.0f} ({max(strikes.recoveries or [0.0]):.0f})"
    silence = f"{recorder.longest_silence_s:.1f} ({quiet_s:.1f})"
    cells = (fault.name, code, len(run.lines), recovered, silence, len(failures), "yes" if is_same else "no")
    table.append(f"| {' | '.join(map(str, cells))} |")
    recorder.note(f"{table[-1]}\n")
    assert code == 0, run.text
    assert strikes.num_strikes == NUM_STRIKES, run.text
    assert [line["round"] for line in run.lines] == list(range(1, fault.num_rounds + 1))
    assert recorder.longest_silence_s <= MAX_SILENCE_S, run.text
    assert (is_same and not failures) or not fault.is_equal, run.text


def wait_for_nodes(federation) -> None:
    """Wait until all nodes are connected."""
    until, control = time.monotonic() + LIMIT_S, CoordinatorClient(federation.address, federation.keys / "operator")
    while not all(node.state == "online" for node in control.node_states()):
        assert time.monotonic() < until, control.node_states()
        federation.rehearsal.restart_exited()
        time.sleep(0.5)
    control.close()


def follow(federation, recorder, meanwhile: Callable[[], None], monkeypatch, words):
    """Submit a run, follow it to its end, and return its exit code and the measured load."""
    request = compose_request(
        [
            *federation.words,
            "strategy=slow",
            *words,
            f"hydra.run.dir={recorder.path.stem}",
        ]
    )
    with monkeypatch.context() as patch, LoadMeter(federation.folder) as load:
        patch.setattr(sys, "stdout", recorder)
        patch.setattr(sys, "stderr", recorder)
        return federation.follower(meanwhile).run({**request, "rerun_command": "again"}), load
