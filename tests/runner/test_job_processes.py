"""The number of jobs of a sweep that run at the same time, and when the next job starts."""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest

from fedlearn.core import threads
from fedlearn.errors import SettingError
from fedlearn.runner import job_processes, process_template
from fedlearn.runner.job_processes import JobProcesses, jobs_at_a_time

VECTOR = {"_target_": "fedlearn.vector"}


GIB = 2**30


class Running(job_processes._Process):
    """Stand for a process of a sweep, which has a job."""

    def __init__(self):
        super().__init__(pipe=None, pid=1, job="job")
        self.signals = []

    def signal(self, number):
        self.signals.append(number)


def processes_of(size, run=print, *, prepare=lambda: None, report_death=print):
    return JobProcesses(size, prepare=prepare, run=run, report_death=report_death)


def record(folder, job):
    """Write the job of a process, its environment, and the number of modules that it imports."""
    before = len(sys.modules)
    import wave  # noqa: F401

    if job == "die":
        os._exit(9)
    cores, words = os.environ["FEDLEARN_NUM_CORES"], os.environ.get("WORDS", "")
    with (folder / str(os.getpid())).open("a") as file:
        file.write(f"{job} {cores} {words} {len(sys.modules) - before}\n")


def import_wave(folder):
    """Import a module, and write the process that does."""
    import wave  # noqa: F401

    with (folder / "prepared").open("a") as file:
        file.write(f"{os.getpid()}\n")


def run_forever(folder, job):
    """Run until an interrupt, and write that it came."""
    (folder / f"started_{job}").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / f"interrupted_{job}").touch()
        raise


def fail(job):
    raise OSError(28, "No space left on device")


@contextmanager
def handler_of(number, handler):
    """Set the handler of a signal."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def time_limit(processes, seconds=30):
    """Kill processes after a time, so that no test waits for them forever."""
    pids = [each.pid for each in processes._processes]
    timer = threading.Timer(seconds, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
    timer.start()
    yield
    assert timer.is_alive(), "the processes do not end"
    timer.cancel()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.delenv("FEDLEARN_NUM_CORES", raising=False)  # an earlier test may have set it
    monkeypatch.setattr(job_processes, "available_cores", lambda: 4)
    monkeypatch.setattr(job_processes, "can_fork", lambda: True)
    yield
    for template in multiprocessing.active_children():  # the end of Python would wait for one that a test left
        if not template.daemon:
            template.kill()


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


@pytest.fixture
def fake(monkeypatch):
    """Return processes that do not exist, on a machine with 100 GiB."""
    monkeypatch.setattr(JobProcesses, "_fork", lambda self: None)
    monkeypatch.setattr(job_processes, "_total_bytes", lambda: 100 * GIB)
    monkeypatch.setattr(job_processes, "_resident_bytes", lambda process: 30 * GIB)
    return processes_of(3)


def test_the_next_job_waits_for_a_core_and_for_memory(monkeypatch, fake):
    monkeypatch.setattr(job_processes, "_available_bytes", lambda: free * GIB)
    free = 1
    assert fake._has_room(), "the first job does not wait"
    fake._processes.append(Running())
    free = 44
    assert not fake._has_room(), "less than 1.5 times the memory of a job"
    free = 45
    assert fake._has_room()
    monkeypatch.setattr(job_processes, "_resident_bytes", lambda process: GIB)
    free = 19
    assert not fake._has_room(), "the jobs may still grow"
    free = 90
    fake._processes += [Running(), Running()]
    assert not fake._has_room(), "no core"


def test_the_newest_processes_pause_while_memory_is_scarce(monkeypatch, fake):
    monkeypatch.setattr(job_processes, "_available_bytes", lambda: free * GIB)
    fake._processes += [Running(), Running(), Running()]

    def paused(available):
        nonlocal free
        free = available
        fake._pause_newest()
        return [each.is_paused for each in fake._processes]

    free = 0
    assert paused(50) == [False, False, False]
    assert paused(9) == [False, False, True]
    assert paused(15) == [False, False, True]
    assert paused(9) == [False, True, True]
    assert paused(9) == [False, True, True], "the oldest continues"
    assert paused(50) == [False, False, True]
    assert not fake._has_room()
    assert paused(50) == [False, False, False]
    assert [each.signals for each in fake._processes[1:]] == 2 * [[signal.SIGSTOP, signal.SIGCONT]]


@pytest.mark.process
def test_one_process_imports_libraries_for_all_processes_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    processes = processes_of(2, partial(record, jobs), prepare=partial(import_wave, tmp_path))
    for job in ("die", "die", *range(4)):
        processes.start(job)
    processes.wait()
    (importer,) = (tmp_path / "prepared").read_text().split()
    rows = [line.split() for file in jobs.iterdir() for line in file.read_text().splitlines()]
    assert sorted(row[0] for row in rows) == [*"0123"], "also the processes that replace the dead"
    assert all(row[-1] == "0" for row in rows), "no job imports"
    assert importer not in {str(os.getpid()), *(file.name for file in jobs.iterdir())}
    assert "wave" not in sys.modules


@pytest.mark.process
@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.default_int_handler], ids=["python", "command"])
@pytest.mark.parametrize("victim", ["process", "template"])
def test_a_killed_process_is_reported_and_the_other_jobs_run(tmp_path, victim, handler):
    dead = []
    with handler_of(signal.SIGTERM, handler):
        processes = processes_of(2, partial(run_forever, tmp_path), report_death=dead.append)
    processes.start("first")
    wait_for(lambda: processes._collect(0.1) or (tmp_path / "started_first").exists())
    (running,) = [each for each in processes._processes if each.job is not None]
    victims = [running] if victim == "process" else list(processes._processes)
    os.kill(running.pid if victim == "process" else processes._template._process.pid, signal.SIGKILL)
    wait_for(lambda: processes._collect(0.1) or not any(each in processes._processes for each in victims))
    processes.start("second")
    wait_for(lambda: processes._collect(0.1) or (tmp_path / "started_second").exists())
    processes.interrupt()
    assert dead == ["first"], "the processes of a template end with it"
    assert (tmp_path / "interrupted_second").exists()


@pytest.mark.process
def test_a_process_whose_template_dies_before_its_start_ends(tmp_path, monkeypatch):
    """Check a template that is killed while its process starts, which then gets no signal."""
    real = os.setpgid

    def slow_start(*group):
        (tmp_path / f"start_{os.getpid()}").touch()
        real(*group)
        time.sleep(1)  # before the process asks for a signal at the end of its parent

    monkeypatch.setattr(os, "setpgid", slow_start)
    processes = processes_of(1, partial(run_forever, tmp_path), report_death=lambda job: None)
    wait_for(lambda: len(list(tmp_path.glob("start_*"))) == 2)
    processes._template._process.kill()
    processes._template._process.join()
    (waiting,) = processes._processes
    assert waiting.pipe.poll(30), "the process does not end"
    with pytest.raises(EOFError):  # a process that lives on sends its id
        waiting.pipe.recv()


@pytest.mark.process
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_an_interrupt_reaches_running_jobs_and_waiting_jobs_do_not_start(tmp_path, handler):
    dead = []
    with handler_of(signal.SIGINT, handler):
        processes = processes_of(2, partial(run_forever, tmp_path), report_death=dead.append)
    for job in range(4):
        processes.start(job)
    wait_for(lambda: processes._collect(0.1) or len(list(tmp_path.glob("started_*"))) == 2)
    processes.interrupt()
    assert not dead
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{word}_{i}" for word in ("started", "interrupted") for i in (0, 1)
    }


@pytest.mark.process
@pytest.mark.parametrize("end", ["wait", "interrupt"])
def test_processes_that_pause_after_their_jobs_do_not_block_the_end(end):
    processes = processes_of(2)
    wait_for(lambda: processes._collect(0.1) or all(each.pid for each in processes._processes))
    for each in processes._processes:
        each.job = "job"
        each.pipe.send(({}, "job"))
        assert each.pipe.poll(30), "the job is done, but its message is not read yet"
        each.signal(signal.SIGSTOP)
        each.is_paused = True
    processes._collect(0)
    with time_limit(processes):
        getattr(processes, end)()


@pytest.mark.process
def test_a_job_that_raises_shows_its_traceback(capfd):
    dead = []
    processes = processes_of(2, fail, report_death=dead.append)
    processes.start("job")
    processes.wait()
    assert dead == ["job"]
    assert "in fail" in (errors := capfd.readouterr().err)
    assert "No space left on device" in errors


@pytest.mark.process
def test_an_interrupt_does_not_wait_for_the_imports(tmp_path):
    processes = processes_of(2, prepare=partial(time.sleep, 600))
    processes.start("job")
    start = time.monotonic()
    processes.interrupt()
    assert time.monotonic() - start < 60


@pytest.mark.process
def test_a_failing_import_fails_each_job():
    dead = []
    processes = processes_of(2, prepare=partial(os._exit, 9), report_death=dead.append)
    for job in range(3):
        processes.start(job)
    processes.wait()
    assert sorted(dead) == [0, 1, 2]


@pytest.mark.process
def test_a_process_runs_several_jobs_and_imports_once(tmp_path, monkeypatch):
    dead = []
    processes = processes_of(2, partial(record, tmp_path), report_death=dead.append)
    for job in range(6):
        monkeypatch.setenv("WORDS", f"of{job}")
        processes.start(job)
    processes.start("die")
    processes.start("last")
    processes.wait()
    rows = [[line.split() for line in file.read_text().splitlines()] for file in sorted(tmp_path.iterdir())]
    assert sorted(row[0] for rows_k in rows for row in rows_k) == [*"012345", "last"]
    assert {row[1] for rows_k in rows for row in rows_k} == {"2"}, "half of four cores"
    assert all(row[2] == f"of{row[0]}" for rows_k in rows for row in rows_k if row[0] != "last")
    assert all(row[3] == "0" for rows_k in rows for row in rows_k[1:]), "only the first job of a process imports"
    assert dead == ["die"]


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


def test_the_template_can_be_imported_on_a_system_without_fork(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: {}[method])
    assert "ProcessTemplate" in runpy.run_path(process_template.__file__)
