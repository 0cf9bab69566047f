"""Privacy on the command line: refusals, the header, epsilon in each round, and the end of a budget."""

from __future__ import annotations

import json

import pytest
from needs import needs

from fedlearn.core.privacy_ledger import Event, Ledger, event_history
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.runner.ledger_file import LedgerFile
from simulations.resume import main as resume

needs("dp_accounting", reason="needs fedlearn[privacy]")


CENTRAL = ["strategy.weighting=equal", "privacy=central"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_epsilon_is_told_each_round_in_every_surface(run, summary, capsys):
    code, folder = run(*CENTRAL, "privacy.noise_multiplier=2", "strategy.clients_per_round=5", "report=true")
    out = capsys.readouterr().out
    assert code == 0
    assert "central: one client added or removed" in out
    assert "from the seed: a simulation" in out
    assert "uncovered  the evaluation" in out
    spent = [line["epsilon"] for line in lines(folder)]
    assert spent == sorted(spent)
    assert spent[0] > 0
    assert all(f"epsilon {value:.2f}"[:-1] in out for value in spent)
    assert all(line["epsilon_rdp"] >= line["epsilon"] for line in lines(folder))
    assert all(line["train"] == {} and line["num_examples"] is None for line in lines(folder))
    seen = summary(folder)
    assert seen["epsilon"] == seen["privacy"]["epsilon"] == spent[-1]
    assert seen["privacy"]["sampling"].startswith("Poisson")
    report = (folder / "report.html").read_text()
    assert "<h2>Privacy</h2>" in report
    assert "not covered" in report.lower()


def test_a_run_without_protection_says_so_and_has_no_epsilon(run, summary, capsys):
    _, folder = run("rounds=1")
    assert "protect    none" in capsys.readouterr().out
    assert summary(folder)["epsilon"] is None
    assert summary(folder)["privacy"] is None


def test_an_exhausted_budget_ends_the_run_with_the_model_saved(run, summary, capsys):
    noisy = ["privacy.noise_multiplier=5", "privacy.epsilon=1.5"]
    code, folder = run(*CENTRAL, *noisy, "rounds=50", "evaluate_every=50")
    seen = summary(folder)
    assert code == 0
    assert seen["status"] == "budget_exhausted"
    assert 0 < seen["rounds"] < 50
    assert seen["epsilon"] <= 1.5
    assert f"round {seen['rounds'] + 1} would bring epsilon" in seen["reason"]
    assert sorted((folder / "checkpoints").glob("*"))[-1].name == f"round_{seen['rounds']:06d}.safetensors"
    assert resume([str(folder)]) == 0
    assert "is complete" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_the_ledger(run, summary):
    noisy = [*CENTRAL, "privacy.noise_multiplier=5", "strategy.clients_per_round=4"]
    _, whole = run(*noisy, "rounds=4", folder="whole")
    _, half = run(*noisy, "rounds=2", folder="half")
    assert resume([str(half), "rounds=4"]) == 0
    assert summary(half)["epsilon"] == pytest.approx(summary(whole)["epsilon"], abs=1e-9)
    assert summary(half)["parameters_sha256"] == summary(whole)["parameters_sha256"]


def test_a_resumed_run_has_paid_for_the_uploads_of_failed_rounds(run, summary):
    event = Event(2.5)  # an upload with noise multiplier 5
    _, folder = run("strategy.weighting=equal", "privacy=local", "privacy.noise_multiplier=5", "rounds=1")
    LedgerFile(folder).record(Ledger().charge_clients({0: (event, 4)}))
    assert resume([str(folder), "rounds=2"]) == 0
    expected = max_epsilon_bounds([event_history({event: 5})], delta=1e-5).value
    assert summary(folder)["epsilon"] == pytest.approx(expected, abs=1e-9)


REFUSED = {
    "weights": (["privacy=central", "privacy.noise_multiplier=1"], "strategy.weighting=equal"),
    "no noise": ([*CENTRAL], "a value of epsilon"),
    "nan": ([*CENTRAL, "privacy.noise_multiplier=nan"], "finite number > 0"),
    "delta": ([*CENTRAL, "privacy.noise_multiplier=1", "privacy.delta=0"], "privacy.delta=1e-5"),
    "sampling": ([*CENTRAL, "privacy.noise_multiplier=1", "privacy.sampling=luck"], "privacy.sampling=poisson"),
    "example_dp": (["+local.example_dp.clip=1"], "privacy=example"),
    "typo": ([*CENTRAL, "privacy.noise_multiplyer=1"], "noise_multiplier"),
    "too many": ([*CENTRAL, "privacy.noise_multiplier=1", "strategy.clients_per_round=11"], "at most 10"),
    "small cohort": ([*CENTRAL, "privacy.noise_multiplier=1", "privacy.clip=adaptive"], "privacy.clip=fixed"),
    "local weights": (["privacy=local", "privacy.noise_multiplier=1"], "strategy.weighting=equal"),
}


@pytest.mark.parametrize(("words", "fix"), REFUSED.values(), ids=REFUSED)
def test_what_is_unsound_is_refused_before_anything_is_written(words, fix, run, capsys):
    code, folder = run(*words)
    assert code == 2
    assert fix in capsys.readouterr().err
    assert not folder.exists()


def test_local_and_tree_run_from_the_command_line(run, summary):
    code, folder = run("strategy.weighting=equal", "privacy=local", "privacy.epsilon=5", "rounds=2")
    assert code == 0
    assert 4.9 < summary(folder)["epsilon"] <= 5
    words = ["strategy.weighting=equal", "privacy=ftrl", "privacy.matrix=tree", "privacy.separation=2"]
    code, folder = run(*words, "privacy.epsilon=5", "strategy.clients_per_round=5", "rounds=4", folder="tree")
    assert code == 0
    assert 4.9 < summary(folder)["epsilon"] <= 5


def test_a_mechanism_that_replaces_the_rule_of_a_strategy_is_refused(tmp_path, monkeypatch, capsys, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_mean.py").write_text(
        "from dataclasses import replace\n"
        "from fedlearn import mean\n"
        "from fedlearn.privacy import Mechanism\n"
        "def mine():\n"
        "    protect = lambda strategy, local, population: (replace(strategy, aggregate=mean()), local)\n"
        "    return Mechanism(validate=lambda strategy, local: None, protect=protect, kind='mine')\n"
    )
    code, _ = run("strategy=krum", "privacy._target_=my_mean.mine", "allow_targets=[my_mean]")
    assert code == 2
    assert "keeps the aggregation rule" in capsys.readouterr().err


@pytest.mark.parametrize(("affine", "statistics"), [(False, False), (True, False), (True, True)])
def test_batch_norm_is_refused_before_the_first_round(run, here, monkeypatch, capsys, affine, statistics):
    pytest.importorskip("torch")
    norm = f"nn.BatchNorm1d(8, affine={affine}, track_running_stats={statistics})"
    layers = f"nn.Flatten(), nn.Linear(64, 8), {norm}, nn.Linear(8, 10)"
    name = f"net_{affine}_{statistics}"
    code = f"from torch import nn\n\n\ndef net(framework='torch'):\n    return nn.Sequential({layers})\n"
    (here / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(here))
    settings = ["privacy=example", "privacy.noise_multiplier=1", f"allow_targets=[{name}]", "scenario=digits"]
    code, folder = run(*settings, f"model={{_target_:{name}.net}}", "rounds=1")
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("privacy is example")
    assert "2 (BatchNorm1d)" in error or "2.running_mean" in error
    assert error.count("\n") == 3
    assert not (folder / "metrics.jsonl").exists()
