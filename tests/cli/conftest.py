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
    """An empty working directory, and a compile cache that is not the user's."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax")))
    return folder


@pytest.fixture
def run(here):
    """Run in this process: ``run("rounds=2") -> (exit code, folder)``; quick, unless the words say otherwise."""

    def in_process(*words: str, folder: str = "run") -> tuple[int, Path]:
        code = main([*QUICK, f"hydra.run.dir={folder}", *words])
        return code, here / folder

    return in_process


@pytest.fixture
def command(here):
    """Run as a user does, in a process of its own."""

    def in_shell(module: str, *words: str, **options) -> subprocess.CompletedProcess:
        argv = [sys.executable, "-m", module, *words]
        return subprocess.run(argv, cwd=here, capture_output=True, text=True, timeout=120, **options)

    return in_shell


@pytest.fixture
def summary():
    """``summary(folder)``: what a run's summary.json says."""
    return lambda folder: json.loads((folder / "summary.json").read_text())
