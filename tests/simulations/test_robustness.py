"""The table of robust rules and poisonings."""

from __future__ import annotations

import json
import re

import pytest
from needs import needs

from simulations.robustness import main

needs("torch")

WORDS = ["partition.num_clients=8", "partition=iid", "rounds=4", "fraction=0.25"]


def test_the_command_leaves_table_numbers_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = [*WORDS, "rules=fedavg,nnm+krum", "attacks=none,gaussian,backdoor", f"hydra.run.dir={tmp_path / 'out'}"]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "robustness.json").read_text())["cells"]
    by = {(cell["rule"], cell["attack"]): cell for cell in found}
    assert len(by) == 6
    assert by["fedavg", "none"]["value"] > by["fedavg", "gaussian"]["value"] + 0.1
    assert by["nnm+krum", "gaussian"]["value"] > by["fedavg", "gaussian"]["value"]
    assert by["fedavg", "backdoor"]["attack_success"] is not None
    assert by["fedavg", "none"]["attack_success"] is None
    text = (tmp_path / "out" / "robustness.md").read_text()
    assert "| fedavg |" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    printed = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert cells[0] in printed
    assert all(row in printed for row in cells[2:])
    assert (tmp_path / "out" / "robustness.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rules=fedmedain", "rules=fedmedian"),
        ("attacks=ali", "attacks=alie"),
        ("rules=krum+nnm", "rules=nnm+krum"),
        ("rules=krum", "num_malicious"),
    ],
)
def test_what_cannot_be_compared_is_refused(word, message, tmp_path, capsys):
    words = [*WORDS, "attacks=none", "fraction=0.4", word, f"hydra.run.dir={tmp_path / 'out'}"]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
