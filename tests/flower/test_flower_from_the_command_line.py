"""Flower's strategies are available by name, with their settings; other code of Flower is not."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")

from fedlearn.runner.start import main

FLOWER = "strategy.flower._target_=flwr.serverapp.strategy"
SHORT = ("scenario=digits", "rounds=2", "report=false")


@pytest.fixture
def outcome(tmp_path, monkeypatch, capsys):
    """Return ``outcome(*words)``, which gives the exit code, the metrics of the rounds and the error output."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        code = main([*SHORT, *words, f"hydra.run.dir={folder}"])
        metrics = folder / "metrics.jsonl"
        rounds = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return code, rounds, capsys.readouterr().err

    return run


def test_a_strategy_of_flowers_does_what_ours_of_the_same_name_does(outcome):
    code, theirs, _ = outcome("strategy=flower", f"{FLOWER}.Krum", "+strategy.flower.num_malicious_nodes=2")
    assert code == 0
    _, ours, _ = outcome("strategy=krum", "strategy.num_malicious=2")
    for item, other in zip(theirs, ours, strict=True):
        assert item["test"]["loss"] == pytest.approx(other["test"]["loss"], rel=1e-4)


def test_what_is_misspelt_or_not_a_strategy_is_refused_by_name(outcome):
    code, _, shown = outcome("strategy=flower", f"{FLOWER}.Krum", "+strategy.flower.num_malicius_nodes=2")
    assert (code, "strategy.flower.num_malicious_nodes=2" in shown) == (2, True)
    code, _, shown = outcome("strategy=flower", "strategy.flower._target_=flwr.simulation.run_simulation")
    assert (code, "an installed option, a part of a strategy" in shown) == (2, True)
    code, _, shown = outcome("strategy=flower", "+strategy.flower.min_available_nodes=99")
    assert (code, "at most 20" in shown) == (2, True)
