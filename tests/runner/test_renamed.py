"""An old name of a setting, a group or a command is refused, and the message has the new one."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest

from fedlearn.core.command_line import UsageError
from fedlearn.runner.compose import compose
from fedlearn.runner.plan import build_plan
from fedlearn.runner.renames import RENAMED, new_name
from fedlearn.runner.start import main, parse_args
from simulations.privacy_attack import KINDS

COMMANDS = {old: new for old, new in RENAMED.items() if old.startswith(("simulations.", "fedlearn."))}
OF_AN_ATTACK = {old: new for old, new in RENAMED.items() if new.startswith("privacy_attack.")}
SETTINGS = {old: new for old, new in RENAMED.items() if old not in {**COMMANDS, **OF_AN_ATTACK}}
SST2 = [["scenario=sst2"]]
WITH = {  # the groups that have a setting, and a value that differs from the default
    "attack": ([[]], "alie"),
    "engine.enough": ([["engine=grid"]], "2"),
    "engine.nodes": ([["engine=grid"]], "2"),
    "engine.num_nodes": ([["engine=grid"]], "2"),
    "scenario.alpha": ([["scenario=digits"]], "0.1"),
    "scenario.classes_per_client": ([["partition=shards"], ["scenario=digits", "partition=pathological"]], "3"),
    "scenario.dropout": (SST2, "0.1"),
    "scenario.encoder": (SST2, "my_model"),
    "scenario.layers": (SST2, "2"),
    "scenario.lora_alpha": (SST2, "4"),
    "scenario.lora_on": (SST2, "[query]"),
    "scenario.lora_rank": (SST2, "4"),
    "scenario.model": ([[], ["scenario=digits"]], "linear"),
    "scenario.num_clients": ([[], ["scenario=digits"], ["partition=iid"]], "3"),
    "scenario.partition": ([[], ["scenario=mnist"]], "iid"),
    "scenario.strictness": ([["scenario=folder", "partition=feature"]], "0.3"),
    "scenario.test_share": ([[], ["scenario=movielens"]], "0.3"),
    "scenario.tuning": (SST2, "full"),
    "strategy.candidates": ([["strategy=power_of_choice"]], "7"),
    "strategy.keeps": ([[f"strategy={name}"] for name in ("fcf", "fedbn", "fedper", "fedrep")], "out.*"),
    "strategy.least": ([["strategy=oort"]], "0.3"),
    "strategy.root_examples": ([["strategy=fltrust"]], "50"),
    "system.enough": ([[f"system={name}"] for name in ("constant", "lognormal", "trace")], "3"),
}
CASES = [(old, group, WITH[old][1]) for old in SETTINGS for group in WITH[old][0]]


def composed(*words):
    return compose(parse_args(words))[0].cfg


def hint(*words):
    with pytest.raises(UsageError) as refused:
        composed(*words)
    typed, meant = str(refused.value).splitlines()[:2]
    assert typed == f"{words[-1]} is not a setting"
    return shlex.split(meant.removeprefix("  did you mean ").removesuffix("?"))[0]


@pytest.mark.parametrize(("old", "group", "value"), CASES, ids=lambda part: " ".join(part) if part else "default")
def test_the_new_name_of_a_setting_is_in_the_hint_and_composes(old, group, value):
    meant = hint(*group, f"{old}={value}")
    assert meant == f"{RENAMED[old]}={value}"
    composed(*group, meant)


@pytest.mark.parametrize("old", SETTINGS)
def test_the_hint_does_not_depend_on_the_groups_chosen(old):
    assert hint(f"{old}=3") == f"{RENAMED[old]}=3"


@pytest.mark.parametrize("old", OF_AN_ATTACK)
def test_a_setting_of_the_old_attack_command_has_its_new_name_in_the_hint(old):
    command, _, setting = hint(f"{old}=3").removesuffix("=3").partition(".")
    assert command == "privacy_attack"
    assert any(setting in defaults for defaults, _, _ in KINDS.values())


@pytest.mark.parametrize("word", ["attack.fraction=0.3", "attack.target=1", "attack.boost=2"])
def test_what_stands_below_an_old_group_moves_with_it(word):
    meant = hint("poisoning=backdoor", word)
    assert meant == word.replace("attack", "poisoning")
    composed("poisoning=backdoor", meant)


def test_a_sweep_over_an_old_group_has_the_new_one_in_the_hint(capsys):
    assert main(["-m", "attack=none,alie"]) == 2
    assert "did you mean poisoning=none?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["+attack=alie"], "poisoning=alie"),
        (["strategy=fedbn", "+strategy.keeps=out.*"], "'strategy.personal_parameters=out.*'"),
        (["system=constant", "+system.enough=3"], "system.min_completed=3"),
    ],
)
def test_an_old_name_that_is_added_is_refused_too(words, fix, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert f"try       {fix}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_old_name_in_a_file_of_the_users_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment/mine.yaml"
    mine.write_text("# @package _global_\nattack: {fraction: 0.1}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="its name is poisoning"):
        build_plan(composed("--config-dir", str(tmp_path), "experiment=mine"))
    mine.write_text("# @package _global_\ndefaults:\n  - override /attack: alie\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"did you mean poisoning\?"):
        composed("--config-dir", str(tmp_path), "experiment=mine")


@pytest.mark.cli
@pytest.mark.parametrize("old", COMMANDS)
def test_an_old_command_is_refused_with_the_new_one(old):
    done = subprocess.run([sys.executable, "-m", old, "rounds=2"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{old} is not a command\n  did you mean python -m {COMMANDS[old]}?\n"
    assert find_spec(COMMANDS[old])


def test_no_new_name_is_itself_old():
    assert [new for new in RENAMED.values() if new_name(new)] == []
