"""A rehearsal leaves only the run folder behind, also after an error or an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlearn.runner.start import main as simulate

QUICK = ["scenario=diabetes", "partition.num_clients=4", "report=false"]


@pytest.fixture
def start(tmp_path_factory):
    """Return ``start(*words)``, which gives the process, its working folder and its folder for temporary files."""
    folder = tmp_path_factory.mktemp("l")  # short: the name of a Unix socket is limited to about 100 bytes
    started = []

    def rehearse(*words):
        (folder / "t").mkdir()
        command = [sys.executable, "-m", "fedlearn.deploy.rehearse", "num_nodes=2", *QUICK, *words]
        env = {**os.environ, "TMPDIR": str(folder / "t")}
        out = (folder / "out").open("w+")
        started.append(subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=env))
        return started[-1], folder

    yield rehearse
    for process in started:
        process.kill()
        process.wait(60)


def processes_of(folder):
    """Return the command lines of running processes that contain this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode("utf-8", "replace").replace("\0", " ")
        except OSError:
            continue
        if str(folder / "t") in words:
            found.append(words)
    return found


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def last_parameters(folder):
    return load_file(max((folder / "checkpoints").iterdir()))["params"]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads processes from /proc")


@pytest.mark.slow
@linux
def test_a_torch_node_and_a_jax_node_train_one_model_and_nothing_is_left_behind(start, tmp_path):
    process, folder = start("framework=mixed", "rounds=10", "hydra.run.dir=mixed")
    assert process.wait(240) == 0, (folder / "out").read_text()
    assert processes_of(folder) == []
    assert not list((folder / "t").glob("fedlearn-*"))
    assert simulate([*QUICK, "rounds=10", f"hydra.run.dir={tmp_path / 'torch'}"]) == 0
    mixed, torch = last_parameters(folder / "outputs/mixed"), last_parameters(tmp_path / "torch")
    np.testing.assert_allclose(mixed, torch, atol=1e-4)


@linux
@pytest.mark.slow
def test_sigterm_saves_the_round_and_leaves_nothing_else(start):
    process, folder = start("rounds=1000", "hydra.run.dir=stopped")
    assert wait_for(lambda: "round 1/1000" in (folder / "out").read_text(), 120), (folder / "out").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130, (folder / "out").read_text()
    assert list((folder / "outputs/stopped/checkpoints").iterdir())
    assert processes_of(folder) == []
    assert not list((folder / "t").glob("fedlearn-*"))


@pytest.mark.slow
@linux
def test_no_process_outlives_a_rehearsal_that_is_killed(start):
    process, folder = start("rounds=1000", "hydra.run.dir=killed")
    assert wait_for(lambda: len(processes_of(folder)) >= 9, 120), (folder / "out").read_text()
    os.kill(process.pid, signal.SIGKILL)
    assert wait_for(lambda: processes_of(folder) == [], 120), "\n".join(processes_of(folder))
