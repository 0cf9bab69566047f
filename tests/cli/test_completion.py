"""Shells complete commands, options and settings, without a framework."""

import subprocess
import sys

import pytest

from simulations.completion import GROUPS, SCRIPTS, completions, main

LINES = [
    ("fedlearn ru", ["run"]),
    ("fedlearn deploy st", ["status"]),
    ("fedlearn run strategy=fedp", ["strategy=fedper", "strategy=fedprox"]),
    ("fedlearn run strategy=fedprox strategy.m", ["strategy.mu="]),
    ("fedlearn run local.lea", ["local.learning_rate="]),
    ("fedlearn run framework=t", ["framework=torch"]),
    ("fedlearn deploy submit privacy=ce", ["privacy=central"]),
    ("fedlearn run scenario=folder scenario.pa", ["scenario.partition=", "scenario.path="]),
    ("fedlearn run 'open", []),
    ("fedlearn predict x", []),
    ("fedlearn no-such-command x", []),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_the_last_word_is_completed(line, expected):
    assert completions(line) == expected


def test_an_empty_word_offers_everything():
    assert {"run", "deploy", "completion"} <= set(completions("fedlearn "))
    assert {f"{group}=" for group in GROUPS} <= set(completions("fedlearn run "))


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_is_printed(shell, capsys):
    assert main([shell]) == 0
    assert "fedlearn completion --line" in capsys.readouterr().out


@pytest.mark.process
def test_bash_completes_the_part_after_the_equals_sign(tmp_path):
    command = tmp_path / "fedlearn"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m simulations.cli "$@"\n')
    command.chmod(0o755)
    lines = ["fedlearn run strategy=fedpr", "fedlearn run strategy=fedprox strategy.m"]
    calls = "".join(
        f"COMP_LINE='{line}'; COMP_POINT={len(line)}; _fedlearn_complete; echo \"${{COMPREPLY[@]}}\"\n"
        for line in lines
    )
    script = f'PATH="{tmp_path}:$PATH"\n{SCRIPTS["bash"]}{calls}'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split("\n")[:2] == ["fedprox", "strategy.mu="]


@pytest.mark.process
def test_no_framework_is_imported():
    code = (
        "import sys, simulations.completion; print([name for name in ('torch', 'jax', 'hydra') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
