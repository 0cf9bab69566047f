"""Run the examples. Two quick scripts run by default, all others and the notebooks with ``-m slow``."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ("quickstart", "resume")
NEEDS = {
    "equinox_model": "equinox",
    "fine_tune": "peft",
    "huggingface": "transformers",
    "track_mlflow": "mlflow",
    "track_tensorboard": "tensorboardX",
    "track_trackio": "trackio",
    "track_wandb": "wandb",
}
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def run(script: Path, folder: Path) -> str:
    """Run a script in a folder and return its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_example_runs(name, tmp_path):
    pytest.importorskip("torch")
    assert run(EXAMPLES / f"{name}.py", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.stem not in QUICK], ids=lambda path: path.stem)
def test_an_example_runs(script, tmp_path):
    for module in ("torch", "jax", "matplotlib", "dp_accounting"):
        pytest.importorskip(module)
    if script.stem in NEEDS:
        pytest.importorskip(NEEDS[script.stem])
    assert run(script, tmp_path)


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_run_of_weights_and_biases(tmp_path):
    pytest.importorskip("wandb")
    run(EXAMPLES / "track_wandb.py", tmp_path)
    parts = [path.name for path in tmp_path.rglob("offline-run-*") if path.is_dir()]
    assert len(parts) == 2
    assert len({name.rpartition("-")[2] for name in parts}) == 1


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_run_of_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run(EXAMPLES / "track_trackio.py", tmp_path)
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step from metrics order by step").fetchall()
    assert [step for _, step in rows] == [1, 2, 3, 4, 5]
    assert len({name for name, _ in rows}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_its_stored_outputs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, 4)
    stored = main_outputs(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    assert main_outputs(notebook) == stored
    assert len([text for text in stored if text]) >= 3


def main_outputs(notebook) -> list[str]:
    """Return results and prints of each cell as text. Live tables have times, and warnings have paths."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(map(text_of, found)) for found in outputs]


def text_of(output) -> str:
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return output.data["text/plain"] if output.output_type == "execute_result" else ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_listed(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60
    assert f"`{script.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_output_and_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert "image/png" in text
    assert "site-packages" not in text
