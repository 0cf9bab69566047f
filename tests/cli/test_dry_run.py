"""``dry_run=true`` checks a run and stops before its first round."""

import pytest

from fedlearn import SettingError
from fedlearn.runner.dry_run import is_dry_run, refuse_dry_run


@pytest.fixture
def shown(run, capsys):
    """Return a function that runs a command: ``shown("rounds=2") -> (exit code, run folder, output, errors)``."""

    def call(*settings):
        code, folder = run(*settings)
        captured = capsys.readouterr()
        return code, folder, captured.out, captured.err

    return call


def test_a_dry_run_prints_a_summary_and_leaves_no_folder(shown):
    code, folder, out, _ = shown("dry_run=true")
    assert code == 0
    for label in ("scenario", "model", "protect", "parameters", "traffic", "duration", "dry run"):
        assert any(line.startswith(f"{label} ") for line in out.splitlines()), label
    assert "11 trainable in 2 tensors" in out
    assert not folder.exists()


def test_a_dry_run_predicts_the_final_epsilon(shown):
    settings = ("privacy=central", "privacy.epsilon=8", "strategy.weighting=equal", "cohort=5")
    code, _, out, _ = shown("dry_run=true", *settings)
    assert code == 0
    assert "at most 8.00 after 3 rounds" in out


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["local.learning_rate=-1"], "local.learning_rate is -1"),
        (["model=unknown"], "unknown"),
        (["privacy=central", "privacy.epsilon=8"], "strategy.weighting=equal"),
        (["dry_run=3"], "dry_run is 3"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(shown, settings, text):
    code, folder, out, error = shown("dry_run=true", *settings)
    assert (code, out) == (2, "")
    assert text in error
    assert not folder.exists()


def test_a_dry_run_of_a_sweep_checks_each_value(shown, here):
    code, folder, out, _ = shown("dry_run=true", "-m", "strategy=fedavg,scaffold")
    assert code == 0
    assert out.count("\nstrategy ") == 2
    assert not folder.exists()
    assert not list(here.glob("multirun/*"))


MODELS = """
from torch import nn


def head(*, outputs=1, framework="torch"):
    return nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, outputs))


def flat(*, framework="torch"):
    return nn.Sequential(nn.Linear(10, 1), nn.Flatten(0))


def unused(*, framework="torch"):
    module = nn.Linear(10, 1)
    module.extra = nn.Linear(3, 3)
    return module
"""


@pytest.fixture
def heads(here, monkeypatch):
    (here / "door_heads.py").write_text(MODELS)
    monkeypatch.syspath_prepend(here)
    return "allow_targets=[door_heads]"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (["model._target_=door_heads.head", "model.outputs=2"], "nn.Linear(4, 1) as the last layer"),
        (["model._target_=door_heads.flat"], "nn.Sequential(module, nn.Unflatten(0, (-1, 1)))"),
    ],
)
def test_a_model_of_the_user_that_does_not_fit_is_refused_before_the_first_round(shown, heads, model, text):
    code, folder, _, error = shown(*model, heads)
    assert code == 2
    assert error.startswith("module is ")
    assert text in error
    assert not folder.exists()


def test_a_run_warns_once_about_a_layer_without_a_gradient(shown, heads):
    code, _, _, error = shown("model._target_=door_heads.unused", heads)
    assert code == 0
    assert error.count("extra.bias, extra.weight") == 1


def test_other_commands_refuse_a_dry_run_by_name():
    with pytest.raises(SettingError) as caught:
        refuse_dry_run({"dry_run": True}, "fedlearn.run")
    assert caught.value.expected == "false for fedlearn.run; only simulations.run and deploy.submit have a dry run"
    refuse_dry_run({"dry_run": False}, "fedlearn.run")
    assert not is_dry_run({})
