"""A sweep whose jobs run in other processes: forked processes, or those of the launcher of joblib."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.process]
SWEEP = [sys.executable, "-m", "simulations.run", "-m", "scenario=digits", "rounds=2", "report=false"]


FORKED, JOBLIB = ("num_jobs=2",), ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.fixture(autouse=True, params=[FORKED, JOBLIB], ids=["forked", "joblib"])
def parallel(request):
    """Return the settings that run two jobs at the same time."""
    if request.param == JOBLIB:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra sweep")
    pytest.importorskip("torch")
    return request.param


def _sweep(folder, *words):
    command = [*SWEEP, f"hydra.sweep.dir={folder}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def _digests(folder):
    return {
        path.parent.name: json.loads(path.read_text())["parameters_sha256"] for path in folder.glob("*/summary.json")
    }


def test_jobs_in_processes_have_the_models_of_jobs_in_turn(tmp_path, parallel):
    words = ["strategy=fedavg,fedprox", "seed=1,2"]
    serial = _sweep(tmp_path / "serial", *words, "num_jobs=1")
    done = _sweep(tmp_path / "parallel", *words, *parallel)
    assert (serial.returncode, done.returncode) == (0, 0), done.stderr
    assert len(_digests(tmp_path / "serial")) == 4
    assert _digests(tmp_path / "serial") == _digests(tmp_path / "parallel")
    lines = sorted(line for line in done.stdout.splitlines() if line)
    assert [line.split(":")[0] for line in lines] == ["job 0", "job 1", "job 2", "job 3"]
    assert all("accuracy" in line for line in lines)


def test_a_failed_job_does_not_stop_the_others_and_the_exit_code_names_it(tmp_path, parallel):
    done = _sweep(tmp_path / "s", "partition.num_clients=4,100000", *parallel)
    assert done.returncode == 2
    assert len(_digests(tmp_path / "s")) == 1
    assert "job 1: partition.num_clients=100000: failed" in done.stdout
    assert not list((tmp_path / "s").glob(".exit*"))


def test_ctrl_c_ends_all_jobs(tmp_path, parallel):
    command = [*SWEEP, "rounds=100000", "seed=1,2", f"hydra.sweep.dir={tmp_path / 's'}"]
    run = subprocess.Popen([*command, *parallel], start_new_session=True, stdout=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and len(list((tmp_path / "s").glob("*/metrics.jsonl"))) < 2:
            time.sleep(0.5)
        signal_group(run)
        assert run.wait(120) == 130
    finally:
        signal_group(run, signal.SIGKILL)


def signal_group(run, number=signal.SIGINT):
    with suppress(ProcessLookupError):
        os.killpg(run.pid, number)
