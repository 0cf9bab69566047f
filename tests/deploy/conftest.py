from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedlearn

if find_spec("flwr") and find_spec("cryptography"):
    from fedlearn.deploy.children import GRACE, Children
    from fedlearn.deploy.follow import Follower
    from fedlearn.deploy.local import Rehearsal
    from fedlearn.deploy.submit import experiment
else:  # the extra flower is not installed
    collect_ignore_glob = ["test_*.py"]

FAULTS = Path(__file__).parent / "faults"
ROOT = Path(fedlearn.__file__).parents[1]
DIABETES = ["scenario=diabetes", "scenario.num_clients=4", "report=false"]
WAITS = ["engine.join_timeout=90", "engine.deadline=60"]
POLICY = {
    "scenarios": {"simulations.scenarios.diabetes.diabetes": {}},
    "strategies": {"strategies.fedavg": {}, "faulty.slow": {}, "faulty.raising": {}, "faulty.full": {}},
    "max_rounds": 1000,
    "allow_targets": ["faulty"],
}


@dataclass
class Run:
    """What became of a submitted run."""

    code: int
    text: str
    folder: Path

    @property
    def lines(self) -> list[dict]:
        """What each round left in metrics.jsonl, as far as there are any."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())


class Federation:
    """Two nodes of two clients each and a coordinator, over TLS, for as many runs as there are tests."""

    words = (*DIABETES, "allow_targets=[faulty]", "--config-dir", str(FAULTS / "conf"))

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal

    def __getattr__(self, name):
        return getattr(self.rehearsal, name)

    def submit(self, *words: str) -> list[str]:
        """The command that submits."""
        place = ["--coordinator", self.address, "--keys", str(self.keys / "operator")]
        return [sys.executable, "-m", "fedlearn.deploy.submit", *place, *words]

    def kill_link(self) -> None:
        """Kill Flower's SuperLink, a child of the coordinator's."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = path.read_bytes()
                if b"fedlearn.deploy.superlink" in words and bytes(self.folder) in words:
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def found(self, name: str, code: int = 0, text: str = "") -> Run:
        """What a run left."""
        return Run(code, text, self.runs / name)

    def run(self, *words: str, name: str, after_rounds: int = 0, strike: Callable[[], None] | None = None) -> Run:
        """Submit and look on to the end; ``strike`` is called once so many rounds are done."""
        left = [strike] if strike else []

        def meanwhile() -> None:
            if left and len(self.found(name).lines) >= after_rounds:
                left.pop()()
            self.rehearsal.tend()

        follower = Follower(self.address, self.keys / "operator", 90.0, meanwhile=meanwhile)
        given = {word.partition("=")[0] for word in words}
        waits = [word for word in WAITS if word.partition("=")[0] not in given]
        made = experiment([*self.words, *waits, *words, f"hydra.run.dir={name}"])
        told = io.StringIO()
        with redirect_stdout(told), redirect_stderr(told):
            code = follower.run({**made, "again": "again"})
        return self.found(name, code, told.getvalue())


@pytest.fixture(scope="session")
def federation(tmp_path_factory):
    # a short path: a Unix socket's name has little room
    folder = tmp_path_factory.mktemp("f")
    with pytest.MonkeyPatch.context() as patch, Children(grace=2 * GRACE) as children:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(FAULTS))
        rehearsal = Rehearsal(folder, folder / "runs", [[0, 2], [1, 3]], POLICY)
        rehearsal.start(children)
        yield Federation(rehearsal)
