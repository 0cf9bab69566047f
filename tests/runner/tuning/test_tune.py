import csv
import math
import signal
from contextlib import nullcontext, suppress

import pytest

from fedlearn.core.command_line import UsageError
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.runner.interrupt import Interrupt
from fedlearn.runner.tuning import study as study_module
from fedlearn.runner.tuning.trial_run import TrialResult
from fedlearn.runner.tuning.tune import tune, tune_command

pytest.importorskip("optuna")
SPACE = ["local.learning_rate=loguniform(1e-3,1)", "local.epochs=choice(1,2)"]


@pytest.fixture
def quick_runs(monkeypatch):
    """Replace the run of a trial by a formula, so that a search needs no training."""
    calls = []

    def run_trial(overrides, folder, *, config_dir, watch):
        folder.mkdir(parents=True)
        values = dict(text.split("=") for text in overrides if text.startswith("local."))
        rate = float(values.get("local.learning_rate", 1e-3))
        calls.append(values)
        seed = next((int(text.removeprefix("seed=")) for text in overrides if text.startswith("seed=")), 0)
        best_rate = 0.1 + (0.3 if seed == 1 else 0.0)  # the first seed is an exception
        value = 1 - abs(rate - best_rate) if rate < 0.9 else float("nan")
        problem = "" if value == value else "diverged"
        return TrialResult(value=value, metric="accuracy", problem=problem)

    monkeypatch.setattr(study_module, "run_trial", run_trial)
    return calls


def _rows(folder):
    with open(folder / "trials.csv") as file:
        return list(csv.DictReader(file))


def test_the_search_beats_the_default_and_writes_its_trials(tmp_path, quick_runs):
    result = tune(SPACE, trials=15, folder=tmp_path / "t", show=False)
    assert result.best > result.default
    assert abs(float(result.best_settings["local.learning_rate"]) - 0.1) < 0.05
    assert len(_rows(tmp_path / "t")) == 15
    assert sum(result.importance.values()) == pytest.approx(1)
    assert (tmp_path / "t" / "slices.png").stat().st_size > 1000
    assert result.command.endswith(f"local.epochs={result.best_settings['local.epochs']}")


def test_a_trial_is_the_mean_of_its_seeds(tmp_path, quick_runs):
    """Check that an exceptional seed does not decide, and that each run has a folder."""
    result = tune(["seed=1,2,3,4,5", SPACE[0]], trials=12, folder=tmp_path / "t", show=False)
    assert len(quick_runs) == 5 * 13
    assert abs(float(result.best_settings["local.learning_rate"]) - 0.1) < 0.05
    assert result.default == pytest.approx(1 - (0.399 + 4 * 0.099) / 5)
    assert result.best <= 1 - 0.3 / 5
    names = [path.name for path in (tmp_path / "t").iterdir()]
    assert len([name for name in names if name.startswith("default_seed=")]) == 5
    assert len([name for name in names if name.startswith("7_")]) == 5
    assert result.command.startswith("python -m simulations.run -m ")
    assert result.command.endswith("seed=1,2,3,4,5")
    assert "(mean of 5 seeds)" in result.text
    with pytest.raises(FedlearnError, match="other settings"):
        tune(["seed=1,2", SPACE[0]], trials=12, folder=tmp_path / "t", show=False)


def test_a_trial_with_a_failed_seed_has_no_value(tmp_path, quick_runs, monkeypatch):
    real = study_module.run_trial

    def failing(overrides, folder, **options):
        result = real(overrides, folder, **options)
        failed = "seed=2" in overrides and any(text.startswith("local.") for text in overrides)
        return TrialResult(value=float("nan"), metric="accuracy", problem="diverged") if failed else result

    monkeypatch.setattr(study_module, "run_trial", failing)
    with pytest.raises(FedlearnError, match="no trial has a value: diverged"):
        tune(["seed=1,2,3", SPACE[0]], trials=2, folder=tmp_path / "t", show=False)
    assert len(quick_runs) == 3 + 2 * 2, "no further seed of a failed trial runs"


def test_a_continued_search_has_the_trials_of_an_uninterrupted_one(tmp_path, quick_runs):
    tune(SPACE, trials=14, folder=tmp_path / "whole", show=False)
    for trials in (5, 14):
        tune(SPACE, trials=trials, folder=tmp_path / "parts", show=False)
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "parts")


def test_a_trial_that_ctrl_c_stopped_runs_again(tmp_path, quick_runs, monkeypatch):
    real, count = study_module.run_trial, []

    def stopping(overrides, folder, **options):
        count.append(folder)
        result = real(overrides, folder, **options)
        return TrialResult(value=result.value, metric="accuracy", stopped=True) if len(count) == 3 else result

    tune(SPACE, trials=6, folder=tmp_path / "whole", show=False)
    monkeypatch.setattr(study_module, "run_trial", stopping)
    with pytest.raises(KeyboardInterrupt):
        tune(SPACE, trials=6, folder=tmp_path / "t", show=False)
    tune(SPACE, trials=6, folder=tmp_path / "t", show=False)
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "t")
    assert count[3].name == f"{count[2].name}_2"


@pytest.mark.parametrize("is_dropped", [False, True], ids=["at_the_end_of_a_run", "in_a_callback_of_gc"])
@pytest.mark.parametrize("seeds", [[], ["seed=1,2"]], ids=["no_seeds", "two_seeds"])
def test_no_ctrl_c_is_lost(tmp_path, quick_runs, monkeypatch, is_dropped, seeds):
    """Check a signal that no code after it sees: its run is complete, and its exception is dropped."""
    real, count = study_module.run_trial, []

    def interrupted(overrides, folder, **options):
        count.append(folder)
        if len(count) == 5:
            with suppress(KeyboardInterrupt), nullcontext() if is_dropped else Interrupt():
                signal.raise_signal(signal.SIGINT)
        return real(overrides, folder, **options)

    tune([*SPACE, *seeds], trials=6, folder=tmp_path / "whole", show=False)
    monkeypatch.setattr(study_module, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune([*SPACE, *seeds], trials=6, folder=tmp_path / "t", show=False)
    assert len(count) == 5
    tune([*SPACE, *seeds], trials=6, folder=tmp_path / "t", show=False)
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "t")


def test_failed_trials_do_not_end_the_search(tmp_path, quick_runs):
    result = tune(["local.learning_rate=uniform(0.5,2)"], trials=8, folder=tmp_path / "t", show=False)
    assert {row["state"] for row in _rows(tmp_path / "t")} == {"complete", "fail"}
    assert result.best < 0.61
    with pytest.raises(FedlearnError, match="no trial has a value: diverged"):
        tune(["local.learning_rate=uniform(0.95,2)"], trials=2, folder=tmp_path / "u", show=False)


def test_wrong_words_are_refused_before_a_run(tmp_path, quick_runs):
    folder = tmp_path / "t"
    with pytest.raises(SettingError, match="trials"):
        tune_command([*SPACE, "trials=many", f"folder={folder}"])
    with pytest.raises(SettingError, match=r"local\.epochs"):
        tune(["local.epochs=choice(1,0)"], trials=2, folder=folder)
    with pytest.raises(UsageError, match="learningrate"):
        tune(["local.learningrate=uniform(0,1)"], trials=2, folder=folder)
    with pytest.raises(UsageError, match="two or more different values\n  try       seed=1,2,3"):
        tune(["seed=1,1", *SPACE], trials=2, folder=folder)
    with pytest.raises(SettingError, match="seed"):
        tune(["seed=1,-2", *SPACE], trials=2, folder=folder)
    with pytest.raises(SettingError, match="one mechanism"):
        tune(["privacy=choice(none,central)"], trials=2, folder=folder)
    private = ["privacy=central", "privacy.epsilon=4", "strategy.weighting=equal", *SPACE]
    with pytest.raises(SettingError, match="prune"):
        tune(private, trials=2, prune=True, folder=folder)
    assert not folder.exists()
    assert not quick_runs


def test_a_folder_of_another_search_is_refused(tmp_path, quick_runs):
    tune(SPACE, trials=1, folder=tmp_path / "t", show=False)
    with pytest.raises(FedlearnError, match="other settings"):
        tune([*SPACE, "rounds=3"], trials=2, folder=tmp_path / "t", show=False)
    with pytest.raises(FedlearnError, match="not empty"):
        tune(SPACE, trials=2, folder=tmp_path, show=False)


@pytest.mark.parametrize("name", ["tuning.json", "default/tuning_result.json"])
def test_a_damaged_file_of_a_search_is_refused_by_name(tmp_path, quick_runs, name):
    tune(SPACE, trials=1, folder=tmp_path / "t", show=False)
    (tmp_path / "t" / name).write_text("{")
    with pytest.raises(FedlearnError, match=rf"{name} cannot be read"):
        tune(SPACE, trials=2, folder=tmp_path / "t", show=False)


@pytest.mark.parametrize("seeds", [[], ["seed=1,2"]], ids=["no_seeds", "two_seeds"])
def test_private_trials_are_charged_together(tmp_path, seeds):
    result = tune(
        [
            "scenario=digits",
            "partition.num_clients=4",
            "rounds=1",
            "privacy=central",
            "privacy.epsilon=4",
            "strategy.weighting=equal",
            "local.learning_rate=loguniform(1e-2,1)",
            *seeds,
        ],
        trials=2,
        folder=tmp_path / "t",
        show=False,
    )
    runs = 6 if seeds else 3
    assert result.privacy.num_runs == runs
    assert 4 * math.sqrt(runs) < result.privacy.epsilon < 4 * runs


@pytest.mark.slow
def test_processes_search_and_prune(tmp_path):
    overrides = ["scenario=digits", "rounds=4", "local.learning_rate=loguniform(1e-4,1)"]
    result = tune(overrides, trials=12, jobs=2, folder=tmp_path / "t", show=False)
    assert result.best > result.default
    assert "pruned" in {row["state"] for row in _rows(tmp_path / "t")}
