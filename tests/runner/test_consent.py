"""A configuration file of another person runs no code without the consent of the person who starts the command."""

from __future__ import annotations

import sys

import pytest
from omegaconf import OmegaConf

from fedlearn.errors import FedlearnError, SettingError
from fedlearn.runner.compose import compose
from fedlearn.runner.consent import ALLOW_ENV, require_consent
from fedlearn.runner.instantiation import allowed_modules
from fedlearn.runner.run_config import read_run_config, write_run_config
from fedlearn.runner.start import main, parse_args

CODE = "from pathlib import Path\n\nPath('stolen').touch()\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return a working folder beside a folder that another person shares."""
    folder, shared = tmp_path / "here", tmp_path / "shared"
    folder.mkdir()
    (shared / "experiment").mkdir(parents=True)
    (shared / "own_code.py").write_text(CODE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv(ALLOW_ENV, raising=False)
    yield folder
    sys.modules.pop("own_code", None)


def shared_recipe(here, text):
    (here.parent / "shared/experiment/theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    return ["--config-dir", str(here.parent / "shared"), "scenario=diabetes", "experiment=theirs"]


RECIPES = {
    "a module of Python": "allow_targets: [os]\nstrategy: {_target_: os.system, command: touch stolen}",
    "a module that writes a file": "allow_targets: [logging]\nmodel: {_target_: logging.FileHandler, filename: stolen}",
    "a part of such a module": "allow_targets: [os.path]\nstrategy: {_target_: os.path.exists, path: x}",
    "a text": "allow_targets: subprocess\nmodel: {_target_: subprocess.getoutput, cmd: touch stolen}",
    "an installed package": "allow_targets: [numpy]\nstrategy: {_target_: numpy.save, file: stolen, arr: 1}",
    "a callback": "allow_targets: [os]\n+callbacks: {x: {_target_: os.system, command: touch stolen}}",
    "a module beside the recipe": "allow_targets: [own_code]\nstrategy: {_target_: own_code.mine}",
    "an environment variable": "allow_targets: ['${oc.env:HOME}']",
    "a package of fedlearn": "allow_targets: [fedlearn]\nstrategy: {_target_: fedlearn.deploy.keys.main}",
    "a nested command": "strategy: {clients_per_round: {_target_: fedlearn.deploy.keys.main, argv: [create, stolen]}}",
    "a callback of Hydra": "hydra: {callbacks: {x: {_target_: fedlearn.deploy.keys.main, argv: [create, stolen]}}}",
    "an environment variable of Hydra": "hydra: {job: {env_set: {FEDLEARN_ALLOW_TARGETS: os}}}",
    "a launcher of Hydra": "hydra: {launcher: {_target_: os.system, command: touch stolen}}",
    "a log handler": "hydra: {job_logging: {version: 1, handlers: {x: {(): os.system, command: touch stolen}}}}",
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("more", [[], pytest.param(["-m", "seed=1,2"], marks=pytest.mark.slow)], ids=["run", "sweep"])
def test_a_shared_recipe_brings_no_consent(here, name, more):
    assert main([*shared_recipe(here, RECIPES[name].replace("+callbacks", "callbacks")), *more, "rounds=1"]) == 2
    assert list(here.iterdir()) == []


def test_the_command_line_and_the_environment_give_consent(here, monkeypatch):
    words = shared_recipe(here, "allow_targets: [own_code]")
    with pytest.raises(SettingError, match="FEDLEARN_ALLOW_TARGETS=own_code") as refused:
        compose(parse_args(words))
    assert len(str(refused.value).splitlines()) == 3
    assert compose(parse_args([*words, "allow_targets=[own_code]"]))
    monkeypatch.setenv(ALLOW_ENV, "other,own_code")
    assert compose(parse_args(words))
    assert allowed_modules({"allow_targets": ["mine"]}) == ("mine", "other", "own_code")


def test_a_module_of_the_working_folder_has_consent(here):
    words = shared_recipe(here, "allow_targets: [mine, my_package.part]")
    (here / "mine.py").write_text("")
    (here / "my_package").mkdir()
    assert compose(parse_args(words))


@pytest.mark.parametrize("name", ["os", "posixpath", "sys", "json"])
def test_a_file_with_the_name_of_a_module_of_python_gives_no_consent(here, name):
    (here / f"{name}.py").write_text(CODE)
    with pytest.raises(SettingError, match="a module of the working folder"):
        require_consent([name])


def test_an_installed_package_below_the_working_folder_gives_no_consent(here, monkeypatch):
    site = here / ".venv/lib/site-packages"
    site.mkdir(parents=True)
    (site / "installed_package.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(SettingError, match="a module of the working folder"):
        require_consent(["installed_package"])


@pytest.mark.parametrize("module", ["fedlearn", "fedlearn.deploy", "simulations.run", "strategies"])
def test_no_consent_makes_the_functions_of_fedlearn_available(here, module, monkeypatch):
    with pytest.raises(SettingError, match="your own modules"):
        allowed_modules({"allow_targets": [module]})
    assert main(["scenario=diabetes", f"allow_targets=[{module}]", "rounds=1"]) == 2


def test_a_shared_run_folder_brings_no_consent(here):
    (job,) = compose(parse_args(["scenario=diabetes"]))
    job.cfg.allow_targets = ["os"]
    job.cfg.scenario = {"_target_": "os.system", "command": "touch stolen"}
    shared = here.parent / "shared"
    write_run_config(shared, job.cfg)
    from fedlearn.runner.resume import resume
    from fedlearn.runner.trained_model import load_trained_model

    for read in (read_run_config, resume, load_trained_model):
        with pytest.raises(FedlearnError):
            read(shared)
    assert list(here.iterdir()) == []


def test_the_settings_of_hydra_that_fedlearn_installs_are_accepted(here):
    (job,) = compose(parse_args(["scenario=diabetes"]))
    assert OmegaConf.to_container(job.cfg)["allow_targets"] == []
    assert job.choices["strategy"] == "fedavg"
