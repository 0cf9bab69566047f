"""Search the settings of a run with Optuna: ask for values, run a trial, record the result."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlearn.core.private_files import write_private_json
from fedlearn.errors import FedlearnError, MissingExtra, is_count, require
from fedlearn.runner.interrupt import Interrupt
from fedlearn.runner.run_folder import free_name
from fedlearn.runner.sweep import job_folder
from fedlearn.runner.tuning.search_space import Range, SearchSpace
from fedlearn.runner.tuning.trial_run import Report, TrialResult, TrialWatch, run_trial

STORAGE, SETTINGS, DEFAULT = "study.db", "tuning.json", "default"  # names in the folder of a tuning
QUIET = ("callbacks.console=null", "report=false")  # `fedlearn report FOLDER` draws the report of a trial later
RANDOM_TRIALS = 10  # trials before the sampler and the pruner have enough results


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings of a tuning.

    Args:
        space: searched and fixed settings.
        folder: folder of the study and of all runs.
        trials: number of trials, including an earlier call, >= 1.
        jobs: number of trials at the same time, each in a process, >= 1; default 1.
        seed: seed of the search, >= 0; default 0. The seed of the runs is the setting ``seed``.
        prune: True ends trials whose values are worse than the median of earlier trials; default False.
        config_dir: folder with options of the user.
    """

    space: SearchSpace
    folder: Path
    trials: int
    jobs: int = 1
    seed: int = 0
    prune: bool = False
    config_dir: str | None = None

    def __post_init__(self) -> None:
        require(is_count(self.trials), "trials", self.trials, "a whole number >= 1", "trials=30")
        require(is_count(self.jobs), "jobs", self.jobs, "a whole number >= 1", "jobs=2")
        require(is_count(self.seed, at_least=0), "sampler_seed", self.seed, "a whole number >= 0", "sampler_seed=0")
        require(isinstance(self.prune, bool), "prune", self.prune, "true or false", "prune=true")

    def to_json(self) -> dict[str, Any]:
        """Return the settings that a continued tuning must repeat."""
        ranges = {name: asdict(each) for name, each in self.space.ranges.items()}
        seeds = {"seeds": list(self.space.seeds)} if self.space.seeds else {}
        return {"fixed": list(self.space.fixed), "ranges": ranges, "seed": self.seed, **seeds}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a tuning.

    Attributes:
        number: number of the trial, from 0.
        values: searched setting -> value.
        result: result of its run, or the mean of its runs.
        seconds: duration.
    """

    number: int
    values: dict[str, float | str]
    result: TrialResult
    seconds: float


def run_study(tuning: Tuning, default: TrialResult, on_trial: Callable[[Trial], None]) -> Any:
    """Run the trials that a study lacks, and return the study of Optuna.

    Args:
        tuning: settings of the tuning.
        default: result of the run with default values, which has the metric and its direction.
        on_trial: function that gets each trial at its end.

    Raises:
        MissingExtra: Optuna is not installed.
        KeyboardInterrupt: the user pressed Ctrl-C. The completed trials remain.
    """
    study = _open_study(tuning, maximize=default.maximize)
    waiting = _interrupted(study)
    with Interrupt(at_once=True) as interrupt, _workers(tuning.jobs) as executor:
        running: dict[Future[Trial], Any] = {}
        while waiting or running or len(study.trials) < tuning.trials:
            while len(running) < tuning.jobs and (waiting or len(study.trials) < tuning.trials):
                trial = waiting.pop(0) if waiting else _ask(study, tuning)
                running[executor.submit(_work, tuning, trial.number, trial._trial_id, trial.params)] = trial
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                trial, ended = running.pop(done), done.result()
                if not ended.result.stopped:
                    _tell(study, trial, ended.result)
                    on_trial(ended)
                if ended.result.stopped or interrupt.is_requested:
                    raise KeyboardInterrupt
    return study


def run_folder(tuning: Tuning, name: str, values: Mapping[str, float | str], further: Sequence[str] = ()) -> Path:
    """Return a new folder for a run of a trial.

    Args:
        tuning: settings of the tuning.
        name: start of the name. Values and overrides follow, and a number after an interruption.
        values: searched setting -> value.
        further: further overrides of the run.
    """
    varied = [f"{name}={tuning.space.ranges[name].text(value)}" for name, value in values.items()]
    folder = job_folder(tuning.folder / name, varied)
    return free_name(folder.with_name("_".join([folder.name, *further])))


def run_all_seeds(
    tuning: Tuning, name: str, values: Mapping[str, float | str], report: Report | None = None
) -> TrialResult:
    """Run a trial once with each seed, and return the mean.

    Args:
        tuning: settings of the tuning.
        name: start of the names of the run folders.
        values: searched setting -> value; empty for default values.
        report: function that gets the values of the first run, and can end the trial.
    """
    results: list[TrialResult] = []
    for further in tuning.space.runs:
        watch = TrialWatch() if results or report is None else TrialWatch(report)
        overrides = [*tuning.space.overrides(values), *further, *QUIET]
        folder = run_folder(tuning, name, values, further)
        with Interrupt(at_once=True) as interrupt:
            result = run_trial(overrides, folder, config_dir=tuning.config_dir, watch=watch)
        results.append(result)
        if result.has_no_value or result.is_pruned:
            return result
        if interrupt.is_requested and len(results) < len(tuning.space.runs):
            return replace(result, stopped=True)
    return replace(results[0], value=sum(result.value for result in results) / len(results))


def check_folder(tuning: Tuning) -> None:
    """Write the settings of a new tuning, or compare them with the settings in the folder.

    Raises:
        FedlearnError: the folder has another tuning, or other files.
    """
    path = tuning.folder / SETTINGS
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FedlearnError(f"{path} cannot be read: {error}\n  advice    folder=NEW") from error
        if before != json.loads(json.dumps(tuning.to_json())):
            fix = "the same settings, or folder=NEW"
            raise FedlearnError(f"{tuning.folder} has a tuning with other settings\n  advice    {fix}")
        return
    if tuning.folder.exists() and any(tuning.folder.iterdir()):
        raise FedlearnError(f"{tuning.folder} is not empty, and has no tuning\n  advice    folder=NEW")
    write_private_json(path, tuning.to_json())


def import_optuna() -> Any:
    """Return the module of Optuna, which prints only errors.

    Raises:
        MissingExtra: Optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtra("fedlearn tune", "tune") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _open_study(tuning: Tuning, *, maximize: bool) -> Any:
    optuna = import_optuna()
    return optuna.create_study(
        storage=_storage(tuning),
        study_name="tuning",
        load_if_exists=True,
        direction="maximize" if maximize else "minimize",
    )


def _storage(tuning: Tuning) -> str:
    return f"sqlite:///{(tuning.folder / STORAGE).absolute()}"


def _interrupted(study: Any) -> list[Any]:
    """Return the trials of an earlier call that did not end. They run again with the same values."""
    optuna = import_optuna()
    trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    return [optuna.trial.Trial(study, trial._trial_id) for trial in trials]


def _ask(study: Any, tuning: Tuning) -> Any:
    """Return the next trial. Its values depend on the seed, its number and the earlier results alone."""
    optuna = import_optuna()
    study.sampler = optuna.samplers.TPESampler(
        seed=(tuning.seed * 1_000_003 + len(study.trials)) % 2**32,
        n_startup_trials=RANDOM_TRIALS,
        constant_liar=tuning.jobs > 1,
    )
    return study.ask({name: _distribution(each) for name, each in tuning.space.ranges.items()})


def _distribution(values: Range) -> Any:
    distributions = import_optuna().distributions
    if values.kind == "choice":
        return distributions.CategoricalDistribution(values.choices)
    assert values.low is not None
    assert values.high is not None
    if values.kind == "integer":
        return distributions.IntDistribution(int(values.low), int(values.high))
    return distributions.FloatDistribution(values.low, values.high, log=values.kind == "loguniform")


def _tell(study: Any, trial: Any, result: TrialResult) -> None:
    states = import_optuna().trial.TrialState
    if result.has_no_value:
        trial.set_user_attr("problem", result.problem)
        study.tell(trial, state=states.FAIL)
    elif result.is_pruned:
        study.tell(trial, state=states.PRUNED)
    else:
        study.tell(trial, result.value)


def _work(tuning: Tuning, number: int, trial_id: int, values: dict[str, float | str]) -> Trial:
    """Run a trial in this process."""
    start = time.perf_counter()
    result = run_all_seeds(tuning, str(number), values, _pruning(tuning, trial_id) if tuning.prune else None)
    return Trial(number=number, values=values, result=result, seconds=time.perf_counter() - start)


def _pruning(tuning: Tuning, trial_id: int) -> Report:
    optuna = import_optuna()
    pruner = optuna.pruners.MedianPruner(n_startup_trials=RANDOM_TRIALS // 2, n_warmup_steps=2)
    study = optuna.load_study(study_name="tuning", storage=_storage(tuning), pruner=pruner)
    trial = optuna.trial.Trial(study, trial_id)

    def report(number: int, value: float) -> bool:
        trial.report(value, number)
        return bool(trial.should_prune())

    return report


@contextmanager
def _workers(jobs: int) -> Iterator[Executor]:
    """Yield an executor: this process for one job, else one process for each job."""
    if jobs == 1:
        yield _InThisProcess()
        return
    executor = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield executor
    finally:
        with suppress(KeyboardInterrupt):
            executor.shutdown(wait=True, cancel_futures=True)


class _InThisProcess(Executor):
    """Run each call at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
