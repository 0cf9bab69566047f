"""Poisoning on the command line: the header names the attack, the report shows its effect, errors explain refusals."""

from __future__ import annotations

import json

import pytest
from needs import needs

from fedlearn.runner.start import main

needs("torch")

DIGITS = ["scenario=digits", "partition.num_clients=10", "rounds=2"]


def test_the_header_says_who_attacks_and_the_report_how_well(tmp_path, capsys):
    folder = tmp_path / "run"
    words = [*DIGITS, "poisoning=backdoor", "poisoning.fraction=0.2", f"hydra.run.dir={folder}"]
    assert main(words) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("poisoning"))
    assert "backdoor" in line
    assert "2 of 10 clients" in line
    found = json.loads((folder / "summary.json").read_text())["final"]
    assert 0 <= found["attack_success"] <= 1
    page = (folder / "report.html").read_text()
    assert "2 of 10 clients" in page
    assert "Attack_success" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["poisoning=sign_flip", "engine=grid"], "poisoning is sign_flip"),
        (["poisoning=sign_flip", "engine=ray"], "engine=vector"),
        (["poisoning=sign_flip", "poisoning.fraction=1.5"], "poisoning.fraction is 1.5"),
        (["poisoning=sign_flip", "strategy.weighting=equal", "privacy=secagg"], "updates without masks"),
        (["poisoning=backdor"], "did you mean poisoning=backdoor"),
        (["poisoning=label_flip", "scenario=diabetes"], "poisoning=sign_flip"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_attack_that_cannot_be_simulated_is_refused(words, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*DIGITS[2:], *words, f"hydra.run.dir={folder}"]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_a_run_without_attack_is_the_run_it_always_was(tmp_path):
    finals = []
    for name, words in (("bare", []), ("nobody", ["poisoning=sign_flip", "poisoning.fraction=0.0"])):
        assert main([*DIGITS, *words, "report=false", f"hydra.run.dir={tmp_path / name}"]) == 0
        finals.append(json.loads((tmp_path / name / "summary.json").read_text())["parameters_sha256"])
    assert finals[0] == finals[1]
