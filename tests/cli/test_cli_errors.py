"""An error on the command line is short, suggests a setting that works, and leaves no run folder."""

from __future__ import annotations

import errno
import re

import pytest

from fedlearn.core import checkpoint
from fedlearn.runner.start import main

WRONG = {
    "strategy=fedadm": ["strategy=fedadm is not known", "did you mean strategy=fedadam?", "fedyogi"],
    "scenario=hart": ["did you mean scenario=heart?"],
    "engine=vectr": ["engine=vectr is not known", "did you mean engine=vector?", "ray, serial, vector"],
    "experiment=flamby_heart_fedaam": ["did you mean experiment=flamby_heart_fedadam?"],
    "rounsd=3": ["rounsd=3 is not a setting", "did you mean rounds=3?"],
    "stratgy=fedavg": ["did you mean strategy=fedavg?"],
    "clients_per_round=3": ["did you mean strategy.clients_per_round=3?"],
    "strategy.mux=1 strategy=fedprox": ["did you mean strategy.mu=1?"],
    "local.lerning_rate=0.1": ["did you mean local.learning_rate=0.1?"],
    "partitoin=iid": ["did you mean partition=iid?"],
    "hydra.run.dri=x": ["did you mean hydra.run.dir=x?"],
    "+strategy.mux=1 strategy=fedprox": ["strategy.mux is 1", "try       strategy.mu=1"],
    "+local.lr=1": ["local.lr is 1", "learning_rate"],
    "+scenario.nope=1": ["scenario.nope is 1", "partition"],
    "strategy.clients_per_round=abc": ["strategy.clients_per_round is abc", "a whole number >= 1"],
    "strategy.clients_per_round=11": ["strategy.clients_per_round is 11", "at most 10"],
    "strategy=fedprox strategy.mu=-1": ["strategy.mu is -1", "a number >= 0"],
    "strategy.weighting=size": ["strategy.weighting is size", "examples, equal"],
    "strategy=fedbuff strategy.buffer_size=11": ["strategy.buffer_size is 11", "at most 10"],
    "strategy=fedbuff system=constant system.min_completed=2": ["system.min_completed is 2", "strategy.buffer_size"],
    "strategy=fedbuff privacy=central privacy.noise_multiplier=1": ["privacy is central", "accounted per round"],
    "system=constant system.min_completed=2 privacy=central privacy.epsilon=2": [
        "system.min_completed is 2",
        "not on the fastest clients",
    ],
    "strategy=fedbuff poisoning=sign_flip": ["poisoning is sign_flip", "poisoning of data"],
    "system=lognorml": ["did you mean system=lognormal?"],
    "system=lognormal system.sigma=-1": ["system.sigma is -1"],
    "system=trace": ["system.path is None", "system.path=devices.csv"],
    "system=trace system.path=nope.csv": ["nope.csv cannot be read", "seconds_per_step"],
    "+logger=tensorboard": ["+logger=tensorboard is not a setting", "did you mean 'callbacks=[tensorboard]'?"],
    "++roundss=3": ["did you mean rounds=3?"],
    "+trainer.clip=1": ["+trainer.clip=1 is not a setting", "strategy"],
    "+hydra.nope=1": ["hydra.nope is not a setting"],
    "+hydra.job.nme=1": ["did you mean hydra.job.name?"],
    "+hydra.sweeper.params.x=1": ["cannot be composed"],
    "~rounds": ["~rounds removes a setting of each run", "try       rounds=20"],
    "~strategy": ["~strategy removes a setting of each run"],
    "lr=0.1": ["did you mean local.learning_rate=0.1?"],
    "rounds=abc": ["rounds is abc", "a whole number >= 1"],
    "rounds=0": ["rounds is 0"],
    "seed=-1": ["seed is -1"],
    "checkpoint_every=0": ["checkpoint_every is 0"],
    "max_failures=1.5": ["max_failures is 1.5", "a share of the cohort", "try       max_failures=2"],
    "engine.num_nodes=3": ["did you mean min_sites=3?"],
    "sites=[../keys]": ["names with letters", "sites=[north,south]"],
    "sites=[north]": ["null in a simulation", "try       sites=null"],
    "local=3": ["local is 3"],
    "local.optimizer=adm": ["local.optimizer is adm", "adam, adamax, adamw", "local.optimizer=adam"],
    "early_stop.metric=rsme": ["early_stop.metric is rsme", "try       early_stop.metric=rmse"],
    "early_stop.metric=auc": ["early_stop.metric is auc", "rmse"],
    "early_stop.patience=0": ["early_stop.patience is 0"],
    "scenario=digits partition=dirichelt": ["partition=dirichelt is not known", "partition=dirichlet?"],
    "partition.num_clients=abc": ["partition.num_clients is abc"],
    "framework=tensorflow": ["framework is tensorflow", "torch, jax"],
    "engine.block_size=0": ["engine.block_size is 0"],
    "seed=1,2": ["seed=1,2 names several values", "-m seed=1,2"],
    "rounds": ["rounds cannot be read", "setting=value"],
    "a=[1": ["a=[1 cannot be read"],
    "--fast": ["--fast is not an option", "setting=value, or one of", "try       python -m simulations.run --help"],
    "--config-dri nope": ["did you mean --config-dir?"],
    "--rounds=3": ["--rounds=3 is not an option", "did you mean rounds=3?"],
    "--config-dir": ["--config-dir has no value"],
    "--cfg jb": ["--cfg is jb", "one of job, hydra, all", "try       --cfg job"],
    "strategy=null": ["cannot be composed"],
    "strategy=[1]": ["cannot be composed"],
    "allow_targets=my_code": ["a list of modules", "try       'allow_targets=[my_code]'"],
    "strategy._target_=os.system": ["strategy._target_ is os.system", "allow_targets=[os]"],
    "strategy._target_=strategies.fedavgg": ["strategies.fedavgg"],
    "scenario.seed=${nope}": ["nope"],
    "--config-dir nope": ["nope is not a folder"],
    "--config-path nope": ["nope is not a folder"],
    "--config-name nope": ["there is no configuration called nope"],
    "-m seed=1,2 strategy=fedavg,fedadm": ["did you mean strategy=fedadam?"],
    "-m seed=1,abc": ["seed is abc"],
    "-m local.learning_rate=interval(0,1)": ["is an interval", "local.learning_rate=1,2,3"],
    "-m --cfg job seed=1,2": ["Only one of"],
    "-m rounsd=1,2": ["did you mean rounds=1?"],
}


@pytest.mark.parametrize("words", WRONG, ids=lambda words: words.replace(" ", "_"))
def test_a_wrong_word_is_told_with_what_was_meant_and_leaves_nothing_behind(words, here, capsys):
    pytest.importorskip("torch")
    scenario = [] if "scenario=" in words else ["scenario=diabetes"]
    assert main([*scenario, *words.split(" ")]) == 2
    shown = capsys.readouterr()
    for phrase in WRONG[words]:
        assert phrase in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert len(shown.err.splitlines()) <= 5
    assert not any(here.iterdir())


def test_a_typo_is_told_at_once_and_with_exit_code_2(command, here):
    done = command("simulations.run", "strategy=fedadm")
    assert done.returncode == 2
    assert "did you mean strategy=fedadam?" in done.stderr
    assert done.stdout == ""
    assert not any(here.iterdir())


def test_a_broken_yaml_of_the_users_is_told_with_its_line(here, capsys):
    (here / "conf/strategy").mkdir(parents=True)
    (here / "conf/strategy/mine.yaml").write_text("_target_: strategies.fedavg\nweighting: [\n")
    assert main(["--config-dir", "conf", "strategy=mine"]) == 2
    shown = capsys.readouterr().err
    assert re.search(r"mine\.yaml.*line 3", shown)


def test_a_folder_that_cannot_be_written_is_named(here, capsys):
    (here / "file").write_text("")
    for folder in ("file", "file/run"):
        assert main(["scenario=diabetes", f"hydra.run.dir={folder}"]) == 2
        shown = capsys.readouterr().err
        assert folder in shown
        assert "try       hydra.run.dir=outputs/run" in shown
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_folder_that_was_there_before_stays_when_the_run_cannot_begin(run, here):
    (here / "mine").mkdir()
    code, folder = run("framework=tensorflow", folder="mine")
    assert code == 2
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("round", [1, 3])
def test_a_full_disk_ends_a_run_with_exit_code_3_and_a_hint(run, summary, monkeypatch, capsys, round):
    pytest.importorskip("torch")
    save = checkpoint.save

    def full(folder, state, *args, **kwargs):
        if state.round == round:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(folder, state, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", full)
    code, folder = run()
    assert code == 3
    shown = capsys.readouterr().err
    assert "run can no longer be written: No space left on device" in shown
    assert "python -m simulations.resume run" in shown
    assert "Traceback" not in shown
    assert "No space left" in (folder / "run.log").read_text()


def test_a_run_folder_that_disappears_ends_a_run_with_exit_code_3(run, monkeypatch, capsys):
    pytest.importorskip("torch")
    save = checkpoint.save

    def then_lose_it(folder, *args, **kwargs):
        save(folder, *args, **kwargs)
        folder.parent.rename(folder.parent.with_name("moved"))

    monkeypatch.setattr(checkpoint, "save", then_lose_it)
    code, _ = run()
    assert code == 3
    assert "can no longer be written" in capsys.readouterr().err


def test_too_many_failures_end_a_run_with_exit_code_3_and_keep_its_last_checkpoint(run, summary, capsys, monkeypatch):
    pytest.importorskip("torch")
    from fedlearn.trainers.torch import TorchTrainer

    fit = TorchTrainer.fit

    def fails_in_round_3(self, order, *args, **kwargs):
        if order.round == 3:
            raise ArithmeticError("the gradient is not finite")
        return fit(self, order, *args, **kwargs)

    monkeypatch.setattr(TorchTrainer, "fit", fails_in_round_3)
    code, folder = run("rounds=5")
    assert code == 3
    assert summary(folder)["status"] == "failed"
    assert summary(folder)["rounds"] == 2
    assert "the gradient is not finite" in summary(folder)["reason"]
    assert (folder / "checkpoints/round_000002.safetensors").exists()
