"""Kill processes of a federation at random moments. The run ends with the same model, and is never silent for long."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from fault_injection import PARTS, LoadMeter, Recorder, processes_of, send

from fedlearn.deploy.submit import compose_request

if sys.platform != "linux":
    pytest.skip("finds the processes in /proc", allow_module_level=True)

MAX_SILENCE_S = 15.0
LIMIT_S = 900.0  # a quiet machine needs about five minutes
MAX_KILLS_PER_ROUND = 4
SEEDS = (5, 6, 7)


def run_under_fire(federation, words, recorder, *, num_kills, seed, interval_s, monkeypatch):
    """Run an experiment, and kill a random process after random pauses."""
    draws, kills, rounds = random.Random(seed), [], []  # rounds: number of completed rounds at each kill
    due = [time.monotonic() + 3.0]
    ends, stopped = time.monotonic() + LIMIT_S, []
    name = recorder.path.stem

    def strike():
        recorder.restart_exited(federation.rehearsal)
        if time.monotonic() > ends and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGINT))
        num_rounds = len(federation.found(name).lines)
        is_stuck = rounds[-MAX_KILLS_PER_ROUND:] == [num_rounds] * MAX_KILLS_PER_ROUND  # then a round is due
        if len(kills) == num_kills or time.monotonic() < due[0] or not num_rounds or is_stuck:
            return
        part = draws.choice(sorted(PARTS))
        if candidates := processes_of(federation.folder, part):
            send(signal.SIGKILL, [draws.choice(candidates)])
            rounds.append(num_rounds)
            kills.append((round(time.monotonic() - recorder.times[0], 1), part))
            recorder.note(f"killed {part}\n")
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
@pytest.mark.parametrize("seed", SEEDS)
def test_thirty_kills_at_random_moments_change_nothing(federation, tmp_path, monkeypatch, seed):
    words = ("strategy=slow", "rounds=20", "engine.join_timeout=180", "engine.deadline=180", "max_failures=0.0")
    recorder = Recorder(tmp_path / f"chaos{seed}.log")
    with LoadMeter(federation.folder) as load:
        code, kills = run_under_fire(
            federation, words, recorder, num_kills=30, seed=seed, interval_s=5.0, monkeypatch=monkeypatch
        )
    longest = max(recorder.silences, key=lambda silence: silence[1] - silence[0])
    silence_s, quiet_s = recorder.longest_silence_s, max(load.quiet_s(*silence) for silence in recorder.silences)
    report = f"longest silence {silence_s:.1f} s, {load.quiet_s(*longest):.1f} s of it without other programs; "
    report += f"longest without other programs {quiet_s:.1f} s"
    recorder.note(f"{report}\n")
    run = federation.found(f"chaos{seed}", code, recorder.getvalue())
    assert code == 0, run.text
    assert len(kills) == 30, run.text
    assert [line["round"] for line in run.lines] == list(range(1, 21))
    assert not [failure for line in run.lines for failure in line["failures"]], run.text
    assert silence_s <= MAX_SILENCE_S, f"{report}\n{run.text}"
    from tests.deploy.test_deployment import sha_of_simulation

    assert run.summary["parameters_sha256"] == sha_of_simulation(tmp_path / "undisturbed", "rounds=20")


def test_a_line_of_another_thread_ends_a_silence_while_processes_are_restarted(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "log")
    monkeypatch.setattr(sys, "stderr", recorder)

    def restart_exited():
        sys.stderr.write("node0 is restarted\n")
        thread = threading.Thread(target=lambda: sys.stderr.write("waiting\n"))
        thread.start()
        thread.join(60)

    recorder.restart_exited(SimpleNamespace(restart_exited=restart_exited))
    assert recorder.getvalue() == "waiting\n"
    assert len(recorder.times) == 2
    assert "node0 is restarted" in (tmp_path / "log").read_text()
