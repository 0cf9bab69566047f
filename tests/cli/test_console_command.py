"""The console command ``fedlearn`` starts each command, as ``python -m`` does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedlearn
from fedlearn.core.command_line import console_name
from simulations.cli import COMMANDS, MODULES, main

ROOT = Path(fedlearn.__file__).parents[1]
# other commands start these programs
INTERNAL = {
    "fedlearn.deploy.node_side.messenger",
    "fedlearn.deploy.coordinator_side.superexec",
    "fedlearn.deploy.coordinator_side.superlink",
}
OLD_NAMES = {"simulations.attack", "simulations.sample", "fedlearn.deploy.local"}
SCRIPT = "import sys; from simulations.cli import main; sys.exit(main())\n"  # as pip writes it


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "bin" / "fedlearn"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return [sys.executable, str(path)]


def modules_that_are_commands():
    for folder in ("fedlearn", "simulations"):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if "benchmarks" not in name and 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                yield name


def test_each_module_with_a_command_line_is_a_command():
    assert {*modules_that_are_commands()} - INTERNAL - OLD_NAMES - {"simulations.cli"} == {*MODULES.values()}


@pytest.mark.parametrize("name", MODULES)
def test_the_name_of_a_command_follows_from_its_module(name):
    assert console_name(MODULES[name]) == f"fedlearn {name}"
    assert find_spec(MODULES[name])


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed_in_groups_with_one_line_each(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"\n{title}\n" in out for title in COMMANDS)
    assert all(re.search(rf"^  {name} +\w", out, re.MULTILINE) for name in MODULES)
    assert max(map(len, out.splitlines())) <= 100


def test_a_group_lists_its_commands(capsys):
    for words in (["deploy"], ["deploy", "--help"]):
        assert main(words) == 0
        listed = re.findall(r"^  (\S+ \S+)  ", capsys.readouterr().out, re.MULTILINE)
        assert {*listed} == {name for name in MODULES if name.startswith("deploy ")}


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["rn", "rounds=2"], "fedlearn run"),
        (["deploy", "kys"], "fedlearn deploy keys"),
        (["attack"], "fedlearn privacy-attack"),
        (["--vrsion"], "fedlearn --help"),
        (["rounds=2"], "fedlearn run rounds=2"),
        (["deploy", "xyzzy"], "fedlearn deploy --help"),
    ],
)
def test_a_typo_is_told_with_what_was_meant(words, fix, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(f"\n  try       {fix}\n")
    assert (captured.out, len(captured.err.splitlines())) == ("", 3)


@pytest.mark.parametrize("name", MODULES)
def test_each_command_shows_version_and_help_and_refuses_an_unknown_option(name, capsys, monkeypatch):
    pytest.importorskip("flwr", reason="needs fedlearn[flower]")
    monkeypatch.setattr(sys, "argv", ["bin/fedlearn"])
    words = name.split()
    assert main([*words, "--version"]) == 0
    assert capsys.readouterr().out == f"fedlearn {fedlearn.__version__}\n"
    assert main([*words, "--help"]) == 0
    assert len(capsys.readouterr().out) > 100
    words += ["kind=gradient_inversion"] if name == "privacy-attack" else []
    assert main([*words, "--no-such-option"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("--no-such-option is not an option\n  ")
    assert (captured.out, len(captured.err.splitlines())) == ("", 3)
    assert f"fedlearn {name}" in captured.err or "did you mean" in captured.err or name == "deploy submit"


def test_the_help_of_a_command_is_that_of_its_module(script, command, here):
    ours = subprocess.run([*script, "run", "--help"], cwd=here, capture_output=True, text=True, timeout=120)
    assert ours.stdout == command("simulations.run", "--help").stdout
    assert "strategy: " in ours.stdout


def test_listing_the_commands_imports_no_library():
    code = "import sys; from simulations.cli import main; main(['--help']); sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {module.split(".")[0] for module in done.stderr.split()}
    assert not loaded & {"fedlearn", "strategies", "hydra", "omegaconf", "numpy", "torch", "jax", "flwr", "rich"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_after_its_round_with_the_command_that_resumes_it(script, here, number):
    pytest.importorskip("torch")
    words = ["scenario=diabetes", "rounds=100000", "report=false", "evaluate_every=1000", "hydra.run.dir=run"]
    process = subprocess.Popen([*script, "run", *words], cwd=here, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    metrics, until = here / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"fedlearn resume run" in out + err
    assert json.loads((here / "run/summary.json").read_text())["status"] == "stopped"


def test_a_missing_extra_is_named_without_a_traceback(tmp_path, capsys, monkeypatch):
    hidden = {"cryptography", "flwr", "grpc", "grpc_health"}
    for name in [name for name in sys.modules if name.startswith("fedlearn.deploy")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name in hidden else find_spec(name))
    assert main(["deploy", "keys", "show", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("  try       pip install 'fedlearn[flower]'\n")
