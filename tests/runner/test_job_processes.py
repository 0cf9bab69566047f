"""The number of jobs of a sweep that run at the same time, and when the next job starts."""

import os

import pytest

from fedlearn.core import threads
from fedlearn.errors import SettingError
from fedlearn.runner import job_processes
from fedlearn.runner.job_processes import JobProcesses, jobs_at_a_time

VECTOR = {"_target_": "fedlearn.vector"}


class Running:
    """Stand for a process of a job that has not ended."""

    pid, sentinel = 1, 0

    def is_alive(self):
        return True


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(job_processes, "available_cores", lambda: 4)
    monkeypatch.setattr(job_processes, "can_fork", lambda: True)


@pytest.mark.parametrize(
    ("num_jobs", "target", "device", "expected"),
    [
        (None, "fedlearn.vector", "cpu", 4),
        (3, "fedlearn.vector", "cpu", 3),
        (3, "fedlearn.serial", "cuda:0", 3),
        (None, "fedlearn.serial", "cpu", 1),
        (None, "fedlearn.engines.ray", "cpu", 1),
        (None, "fedlearn.vector", "cuda:0", 1),
    ],
)
def test_small_runs_on_a_cpu_use_all_cores(num_jobs, target, device, expected):
    assert jobs_at_a_time(num_jobs, {"_target_": target}, device) == expected


def test_a_process_that_cannot_fork_runs_one_job_at_a_time(monkeypatch):
    monkeypatch.setattr(job_processes, "can_fork", lambda: False)
    assert jobs_at_a_time(None, VECTOR, "cpu") == jobs_at_a_time(1, VECTOR, "cpu") == 1
    with pytest.raises(SettingError, match="num_jobs=1"):
        jobs_at_a_time(2, VECTOR, "cpu")


def test_the_next_job_waits_for_a_core_for_a_result_and_for_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(job_processes, "_resident_bytes", lambda process: 100)
    monkeypatch.setattr(job_processes, "_available_bytes", lambda: free)
    processes, free = JobProcesses(2), 149.0
    assert processes._has_room()
    processes._running[Running()] = tmp_path / "metrics.jsonl"
    assert not processes._has_room(), "the memory of the first job is not known"
    (tmp_path / "metrics.jsonl").touch()
    assert not processes._has_room(), "too little memory"
    free = 150.0
    assert processes._has_room()
    processes._running[Running()] = tmp_path / "other"
    assert not processes._has_room(), "no core"


def test_one_variable_limits_the_cores_of_a_process_and_of_its_children(monkeypatch):
    for name in ("FEDLEARN_NUM_CORES", "OMP_NUM_THREADS", "NPROC", *threads.LIBRARIES):
        monkeypatch.setitem(os.environ, name, "1")
        monkeypatch.delitem(os.environ, name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    threads.limit_threads(3)
    assert threads.available_cores() == threads.num_threads() == 3
    assert (os.environ["NPROC"], os.environ["OPENBLAS_NUM_THREADS"]) == ("3", "1")
    threads.limit_threads()
    assert threads.available_cores() == 3
