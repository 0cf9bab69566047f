"""The processes and the jobs of a sweep: cores, errors and exit codes."""

import os
import signal
import time
from functools import partial

import pytest
from omegaconf import OmegaConf

from fedlearn.core.command_line import DONE, FAILED, terminate_as_interrupt
from fedlearn.core.threads import available_cores
from fedlearn.errors import SettingError
from fedlearn.runner import job_processes, sweep
from fedlearn.runner.compose import Job, compose_each
from fedlearn.runner.interrupt import Interrupt
from fedlearn.runner.job_processes import JobProcesses
from fedlearn.runner.rounds import RunOutcome
from fedlearn.runner.start import parse_args
from fedlearn.runner.sweep import Sweep, processes_for

WORDS = ("-m", "scenario=diabetes")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("FEDLEARN_NUM_CORES", None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr(job_processes, "can_fork", lambda: True)


@pytest.fixture
def processes(monkeypatch):
    """Return a function that returns the processes of a command line, which do not start."""
    monkeypatch.setattr(JobProcesses, "_fork", lambda self: None)

    def of_command(*words):
        args = parse_args([*WORDS, *words])
        return processes_for(next(compose_each(args)), args.overrides)

    return of_command


@pytest.mark.parametrize(
    ("words", "num_jobs", "cores_of_job"),
    [
        (("seed=range(20)",), 8, 1),
        (("seed=range(20)", "num_cores=4"), 4, 1),
        (("seed=range(20)", "num_cores=4", "num_jobs=2"), 2, 2),
        (("seed=range(20)", "num_cores=4", "num_jobs=6"), 4, 1),
        (("seed=range(20)", "num_cores=100"), 8, 1),
        (("seed=1,2", "num_cores=6"), 2, 3),
    ],
)
def test_all_jobs_of_a_sweep_together_use_at_most_num_cores(processes, words, num_jobs, cores_of_job):
    started = processes(*words)
    assert (started.size, started.num_cores) == (num_jobs, cores_of_job)


def test_one_core_runs_one_job_at_a_time(processes, monkeypatch):
    assert processes("seed=1,2", "num_jobs=2", "num_cores=1") is None
    assert available_cores() == 1
    monkeypatch.setitem(os.environ, "FEDLEARN_NUM_CORES", "1")
    assert processes("seed=1,2", "num_jobs=2") is None


@pytest.mark.parametrize("word", ["num_jobs=0", "num_jobs=two", "num_cores=0.5"])
def test_a_number_of_jobs_or_cores_is_a_whole_number(processes, word):
    with pytest.raises(SettingError, match=word.replace("=", " is ")):
        processes("seed=1,2", word)


def test_values_in_a_configuration_file_run_at_the_same_time(processes, tmp_path):
    (tmp_path / "experiment").mkdir()
    values = "# @package _global_\nhydra: {sweeper: {params: {seed: 'range(4)'}}}\n"
    (tmp_path / "experiment" / "seeds.yaml").write_text(values)
    assert processes(f"--config-dir={tmp_path}", "experiment=seeds", "num_jobs=4").size == 4


def test_jax_multiplies_in_float32_if_the_jobs_run_on_a_gpu(processes, monkeypatch):
    precision = []
    monkeypatch.delitem(os.environ, "JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    monkeypatch.setattr(
        sweep, "import_module", lambda name: precision.append(os.environ["JAX_DEFAULT_MATMUL_PRECISION"])
    )
    processes("framework=jax", "device=cuda", "num_jobs=2", "seed=1,2")._prepare()
    assert precision == ["highest"], "JAX reads the variable when it is imported"


def test_a_framework_that_fails_to_load_is_left_to_the_jobs(processes, monkeypatch):
    def load(name):
        raise OSError(f"{name}: libcudnn.so is no library")

    monkeypatch.setattr(sweep, "import_module", load)
    processes("seed=1,2")._prepare()


def run_job(folder, job):
    """Raise an error in the first job, and wait in the second one."""
    if job.folder.name == "full":
        raise OSError(28, "No space left on device")
    (folder / f"cores_{job.cfg.num_cores}_{os.environ['FEDLEARN_NUM_CORES']}").touch()
    if job.folder.name == "long":
        time.sleep(60)
    return RunOutcome(exit_code=0)


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """Return a function that starts jobs with these folders in a process, and returns the sweep."""
    before = signal.getsignal(signal.SIGTERM)
    terminate_as_interrupt()
    monkeypatch.setattr(sweep, "interpolation_source", lambda: None)
    monkeypatch.setattr(sweep, "use_for_interpolation", lambda source: None)
    sweeps = []

    def start(*names, **settings):
        processes = JobProcesses(1, prepare=lambda: None, run=sweep._run_item, report_death=sweep._report_death)
        run = partial(run_job, tmp_path)
        sweeps.append(Sweep(folder=tmp_path, fixed=frozenset(), run=run, is_parallel=True, processes=processes))
        for name in names:
            cfg = OmegaConf.create({"callbacks": {}, **settings})
            sweeps[-1]._start(Job(cfg=cfg, folder=tmp_path / name, chosen=True), [])
        return sweeps[-1]

    yield start
    signal.signal(signal.SIGTERM, before)
    for each in sweeps:
        each.close()


@pytest.mark.process
def test_a_job_that_raises_fails_with_its_traceback_and_the_next_job_runs(in_process, tmp_path, capfd):
    running = in_process("full", "next", num_cores=100)
    running.wait()
    assert running.worst_exit_code() == FAILED
    assert (tmp_path / "cores_8_8").exists(), "a job has no more cores than its process"
    out, errors = capfd.readouterr()
    assert "job full: no setting varies: failed" in out
    assert "in run_job" in errors
    assert "No space left on device" in errors
    assert "memory" not in errors


@pytest.mark.process
def test_the_death_of_the_template_is_no_interrupt_of_the_user(in_process, tmp_path, capfd):
    running = in_process("long", num_cores=2)
    end = time.monotonic() + 60
    while not (tmp_path / "cores_2_8").exists():
        running.processes._collect(0.1)
        assert time.monotonic() < end, "timeout"
    running.processes._template.kill()
    running.wait()
    assert running.worst_exit_code() == FAILED
    assert "job long: no setting varies: its process died" in capfd.readouterr().err


def test_ctrl_c_at_the_end_of_a_job_ends_a_serial_sweep(tmp_path):
    """Check that no further job starts, and that the complete job keeps its exit code."""
    started = []

    def run(job):
        started.append(job.folder.name)
        with Interrupt():  # a run whose rounds have ended
            signal.raise_signal(signal.SIGINT)
        return RunOutcome(exit_code=DONE)

    serial = Sweep(folder=tmp_path, fixed=frozenset(), run=run, is_parallel=False, processes=None)
    with pytest.raises(KeyboardInterrupt):
        serial._start(Job(cfg=OmegaConf.create({}), folder=tmp_path / "first", chosen=True), [])
    assert started == ["first"]
    assert serial.worst_exit_code() == DONE
