"""Each fault of `mutants.py` makes a test fail. The slow test builds all faults; run it with ``-m slow``."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("fedlearn", "strategies", "simulations", "conf", "tests", "examples", "docs", "pyproject.toml", "README.md")
LIMIT_S = 300.0  # limit for the tests of one fault
FAILED = 1  # exit code of pytest if a test failed


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_changes_places_that_exist_and_names_tests_that_exist(mutant):
    for change in mutant.changes:
        source = (ROOT / change.path).read_text()
        assert source.count(change.old) == 1, f"{change.path} has another text now: {change.old}"
        ast.parse(source.replace(change.old, change.new))
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), path
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test


def test_no_fault_is_listed_twice():
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names)
    assert len({mutant.changes for mutant in mutants.MUTANTS}) == len(names) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_test_fails_with_each_fault(mutant, tmp_path):
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    for change in mutant.changes:
        path = tmp_path / change.path
        path.write_text(path.read_text().replace(change.old, change.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *mutant.tests]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == FAILED, f"no test notices: {mutant.name}\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
