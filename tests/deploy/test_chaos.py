"""Kill processes of a federation at random moments. The run ends with the same model, and is never silent for long."""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fedlearn.deploy.submit import compose_request

if sys.platform != "linux":
    pytest.skip("finds the processes in /proc", allow_module_level=True)

MAX_SILENCE_S = 15.0
LIMIT_S = 900.0  # a quiet machine needs about five minutes
MAX_KILLS_PER_ROUND = 4
PARTS = {  # part of the command line of each kind of process
    "coordinator": b"fedlearn.deploy.coordinator\0",
    "SuperLink": b"coordinator_side.superlink",
    "SuperExec": b"coordinator_side.superexec\0--runtime",
    "run": b"coordinator_side.superexec\0run",
    "node": b"fedlearn.deploy.node\0",
    "messenger": b"node_side.messenger",
    "trainer": b"fedlearn.deploy.trainer",
}


def processes_of(folder: Path, part: str) -> list[int]:
    """Return the ids of the processes of one kind that belong to a federation."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            if PARTS[part] in words and bytes(folder) in words + (path.parent / "environ").read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


class Recorder(io.StringIO):
    """Keep the time of each line, and write the lines to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.times = path, [time.monotonic()]

    def write(self, text: str) -> int:
        if "\n" in text:
            self.times.append(time.monotonic())
        with self.path.open("a") as file:
            file.write(f"{self.times[-1] - self.times[0]:7.1f} {text}" if "\n" in text else text)
        return super().write(text)

    @property
    def longest_silence_s(self) -> float:
        gaps = zip(self.times, [*self.times[1:], time.monotonic()], strict=True)
        return max(later - earlier for earlier, later in gaps)


def run_under_fire(federation, words, recorder, *, num_kills, seed, interval_s, monkeypatch):
    """Run an experiment, and kill a random process after random pauses."""
    draws, kills, rounds = random.Random(seed), [], []  # rounds: number of completed rounds at each kill
    due = [time.monotonic() + 3.0]
    ends, stopped = time.monotonic() + LIMIT_S, []
    name = recorder.path.stem

    def strike():
        federation.rehearsal.restart_exited()
        if time.monotonic() > ends and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGINT))
        num_rounds = len(federation.found(name).lines)
        is_stuck = rounds[-MAX_KILLS_PER_ROUND:] == [num_rounds] * MAX_KILLS_PER_ROUND  # then a round is due
        if len(kills) == num_kills or time.monotonic() < due[0] or not num_rounds or is_stuck:
            return
        part = draws.choice(sorted(PARTS))
        if candidates := processes_of(federation.folder, part):
            victim = draws.choice(candidates)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            rounds.append(num_rounds)
            kills.append((round(time.monotonic() - recorder.times[0], 1), part))
            recorder.write(f"{kills[-1][0]:8} s killed {part}\n")
        due[0] = time.monotonic() + draws.uniform(0.2, 2.0) * interval_s

    follower = federation.follower(strike)
    request = compose_request([*federation.words, *words, f"hydra.run.dir={name}"])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", recorder)
        patch.setattr(sys, "stderr", recorder)
        code = follower.run({**request, "rerun_command": "again"})
    return code, kills


@pytest.mark.slow
@pytest.mark.endurance
def test_thirty_kills_at_random_moments_change_nothing(federation, tmp_path, monkeypatch):
    words = ("strategy=slow", "rounds=20", "engine.join_timeout=180", "engine.deadline=180", "max_failures=0.0")
    recorder = Recorder(tmp_path / "chaos.log")
    code, kills = run_under_fire(
        federation, words, recorder, num_kills=30, seed=5, interval_s=5.0, monkeypatch=monkeypatch
    )
    run = federation.found("chaos", code, recorder.getvalue())
    assert code == 0, run.text
    assert len(kills) == 30, run.text
    assert [line["round"] for line in run.lines] == list(range(1, 21))
    assert not [failure for line in run.lines for failure in line["failures"]], run.text
    assert recorder.longest_silence_s <= MAX_SILENCE_S, run.text
    from tests.deploy.test_deployment import sha_of_simulation

    assert run.summary["parameters_sha256"] == sha_of_simulation(tmp_path / "undisturbed", "rounds=20")
