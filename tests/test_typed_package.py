"""A user's own file passes mypy, and mypy knows the types of lazy names and namespaces."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedlearn

ROOT = Path(fedlearn.__file__).parents[1]
SETTINGS = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,jax.*,flax.*,optax.*,sklearn.*,opacus.*,flwr.*,ray.*,datasets.*,flwr_datasets.*,rich.*]
follow_imports = skip
"""
USER_FILE = """
import fedlearn
from fedlearn import TorchTrainer, from_datasets
from fedlearn.algorithm import SamplingLaw

s: fedlearn.Strategy = fedlearn.Strategy(select=fedlearn.uniform(3), aggregate=fedlearn.mean())
law: SamplingLaw | None = s.select.law


def build(module: object) -> fedlearn.TorchTrainer:
    return TorchTrainer(module, task="binary")


reveal_type(fedlearn.JaxTrainer)
reveal_type(fedlearn.robust.trimmed_mean)
reveal_type(from_datasets)
number: int = fedlearn.mean()
TorchTrainer(None, task=3)
fedlearn.no_such_name
"""
EXPECTED = [
    (13, "fedlearn.trainers.jax.trainer.JaxTrainer"),
    (14, "def (updates_KD: Any, num_trimmed: int) -> Any"),
    (15, "fedlearn.core.federated_data.FederatedData"),
    (16, "Incompatible types in assignment"),
    (17, 'Argument "task"'),
    (18, 'Module has no attribute "no_such_name"'),
]


def test_the_marker_of_a_typed_package_is_in_the_package_data():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in [*data.get("*", ()), *data.get("fedlearn", ())]
    assert (ROOT / "fedlearn/py.typed").exists()


def test_a_file_of_a_user_is_checked_with_the_types_of_fedlearn(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "user.py").write_text(USER_FILE.lstrip())
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    paths = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("user.py:")]
    assert len(lines) == len(EXPECTED), done.stdout
    for line, (number, text) in zip(lines, EXPECTED, strict=True):
        assert line.startswith(f"user.py:{number}:"), done.stdout
        assert text in line, done.stdout
