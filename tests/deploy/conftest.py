from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedlearn

if find_spec("flwr") and find_spec("cryptography"):
    from fedlearn.deploy.connectivity import ConnectionProblem, check_connection
    from fedlearn.deploy.processes import GRACE_S, Children
    from fedlearn.deploy.rehearse import Rehearsal
    from fedlearn.deploy.run_log import Follower
    from fedlearn.deploy.submit import compose_request
else:  # the extra flower is not installed
    collect_ignore_glob = ["test_*.py"]

FAULTS = Path(__file__).parent / "faults"
ROOT = Path(fedlearn.__file__).parents[1]
DIABETES = ["scenario=diabetes", "partition.num_clients=4", "report=false"]
WAITS = ["engine.join_timeout=90", "engine.deadline=60"]
FAULTY = ("slow", "raising", "full", "held_node", "held_coordinator")
LIMIT_S = 240.0  # limit of each wait; a run that is not finished by then is stopped
POLICY = {
    "scenarios": {"diabetes": {"partition": {"one_of": ["iid"]}}},
    "strategies": {name: {} for name in ("fedavg", *FAULTY)},
    "builders": {"strategy": {name: f"faulty.{name}" for name in FAULTY}},
    "max_rounds": 1000,
}


@dataclass
class Run:
    """The exit code, output and run folder of a submitted run."""

    code: int
    text: str
    folder: Path

    @property
    def lines(self) -> list[dict]:
        """Return the lines of metrics.jsonl; an empty list if there is no file."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())


Event = tuple[Callable[[Run], bool], Callable[[], None]]  # (condition on the run, action once it holds)


def interrupt() -> None:
    """Send SIGINT to this process, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


class Federation:
    """A coordinator and two nodes of two clients each, over TLS. All tests share it."""

    words = (*DIABETES, "allow_targets=[faulty]", "--config-dir", str(FAULTS / "conf"))

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal

    def __getattr__(self, name):
        return getattr(self.rehearsal, name)

    def submit(self, *words: str) -> list[str]:
        """Return the command that submits a run to this coordinator."""
        place = ["--coordinator", self.address, "--keys", str(self.keys / "operator")]
        return [sys.executable, "-m", "fedlearn.deploy.submit", *place, *words]

    def replace_link(self) -> None:
        """Kill Flower's SuperLink, a child process of the coordinator, and wait for its replacement."""
        before = self.children["coordinator"].read_output().count("the SuperLink ended")
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = path.read_bytes()
                if b"fedlearn.deploy.coordinator_side.superlink" in words and bytes(self.folder) in words:
                    os.kill(int(path.parent.name), signal.SIGKILL)
        until = time.monotonic() + LIMIT_S
        while self.children["coordinator"].read_output().count("the SuperLink ended") == before or not self.answers():
            assert time.monotonic() < until, self.children["coordinator"].output_tail()
            time.sleep(0.05)

    def answers(self) -> bool:
        """Return whether the coordinator accepts connections."""
        try:
            check_connection(self.address, self.keys / "operator/ca.crt", timeout_s=2.0)
        except ConnectionProblem:
            return False
        return True

    def follower(self, on_idle: Callable[[], None]) -> Follower:
        """Return a follower that calls a function several times per second."""
        return Follower(self.address, self.keys / "operator", 240.0, on_idle=on_idle)

    def found(self, name: str, code: int = 0, text: str = "") -> Run:
        """Return a run by the name of its folder."""
        return Run(code, text, self.runs / name)

    def run(self, *words: str, name: str, events: Sequence[Event] = ()) -> Run:
        """Submit a run and follow it to its end. Call the action of each event once its condition holds, in order."""
        left, until = list(events), time.monotonic() + LIMIT_S

        def meanwhile() -> None:
            nonlocal until
            if left and left[0][0](self.found(name)):
                left.pop(0)[1]()
            if time.monotonic() > until:
                left.clear()
                until = math.inf  # a second interrupt would end the process of the tests
                interrupt()
            self.rehearsal.restart_exited()

        follower = Follower(self.address, self.keys / "operator", 90.0, on_idle=meanwhile)
        given = {word.partition("=")[0] for word in words}
        waits = [word for word in WAITS if word.partition("=")[0] not in given]
        built = compose_request([*self.words, *waits, *words, f"hydra.run.dir={name}"])
        shown = io.StringIO()
        with redirect_stdout(shown), redirect_stderr(shown):
            code = follower.run({**built, "rerun_command": "again"})
        return self.found(name, code, shown.getvalue())


@pytest.fixture(scope="session")
def federation_class():
    """Return the class of federations, for tests with nodes of another kind."""
    return Federation


@pytest.fixture(scope="session")
def federation(tmp_path_factory):
    # a short path: the name of a Unix socket is limited to about 100 bytes
    folder = tmp_path_factory.mktemp("f")
    with pytest.MonkeyPatch.context() as patch, Children(grace_s=2 * GRACE_S) as children:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(FAULTS))
        previous_mask = os.umask(0)  # files must be private for any umask of the operator
        try:
            rehearsal = Rehearsal(folder, folder / "runs", [[0, 2], [1, 3]], POLICY)
            rehearsal.start(children)
        finally:
            os.umask(previous_mask)
        yield Federation(rehearsal)
