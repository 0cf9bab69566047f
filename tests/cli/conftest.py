from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlearn.runner.start import main

QUICK = ["scenario=diabetes", "rounds=3", "report=false"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Create an empty working directory and a compilation cache for the test."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax")))
    return folder


@pytest.fixture
def run(here):
    """Return a function that runs in this process: ``run("rounds=2") -> (exit code, folder)``.

    The run is short unless the settings say otherwise.
    """

    def in_process(*words: str, folder: str = "run") -> tuple[int, Path]:
        code = main([*QUICK, f"hydra.run.dir={folder}", *words])
        return code, here / folder

    return in_process


@pytest.fixture
def command(here):
    """Return a function that runs a command in its own process, as a user does."""

    def in_shell(module: str, *words: str, **options) -> subprocess.CompletedProcess:
        argv = [sys.executable, "-m", module, *words]
        return subprocess.run(argv, cwd=here, capture_output=True, text=True, timeout=120, **options)

    return in_shell


@pytest.fixture
def summary():
    """Return a function that reads the ``summary.json`` of a run folder."""
    return lambda folder: json.loads((folder / "summary.json").read_text())
