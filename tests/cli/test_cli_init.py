"""``init=``: a run starts from the model of another run or of a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from needs import needs
from safetensors.numpy import load_file, save_file

from fedlearn.core import checkpoint
from simulations import export, resume
from simulations.run import main

needs("torch", reason="torch is not installed")


QUICK = ["scenario=diabetes", "report=false", "rounds=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    assert main([*QUICK, f"hydra.run.dir={folder}"]) == 0
    return folder


def parameters(folder, round):
    (path,) = (folder / "checkpoints").glob(f"round_{round:06d}*")
    return checkpoint._read(path)[1]["params"]


def first_model(folder, *words):
    """Return the model before the first round.

    Rounds with a learning rate of zero do not change it.
    """
    assert main([*QUICK, *words, "local.learning_rate=1e-30", f"hydra.run.dir={folder}"]) == 0
    return parameters(folder, 2)


def test_a_run_starts_from_the_last_model_of_a_run(trained, tmp_path, capsys):
    assert np.array_equal(first_model(tmp_path / "next", f"init={trained}"), parameters(trained, 2))
    header = capsys.readouterr().out
    assert f"weights from {trained}" in " ".join(header.split())


def test_a_run_starts_from_an_exported_file_in_the_other_framework_too(trained, tmp_path):
    assert export.main([str(trained)]) == 0
    file = trained / "model.safetensors"
    assert np.array_equal(first_model(tmp_path / "jax", f"init={file}", "framework=jax"), parameters(trained, 2))


def test_the_header_says_that_weights_are_drawn(trained, capsys, tmp_path):
    first_model(tmp_path / "drawn")
    assert "weights drawn from the seed" in " ".join(capsys.readouterr().out.split())


def test_a_resumed_run_needs_its_source_no_more_once_there_is_a_checkpoint(trained, tmp_path):
    first_model(tmp_path / "next", f"init={trained}")
    assert resume.main([str(tmp_path / "next"), "rounds=3"]) == 0
    assert json.loads((tmp_path / "next" / "summary.json").read_text())["rounds"] == 3


@pytest.mark.parametrize("change", ["shape", "missing", "unknown"])
def test_a_file_of_another_model_is_refused_by_the_first_difference(trained, tmp_path, capsys, change):
    assert export.main([str(trained)]) == 0
    tensors = load_file(trained / "model.safetensors")
    name = min(tensors)
    if change == "shape":
        tensors[name] = np.zeros((9, 9), np.float32)
    elif change == "missing":
        del tensors[name]
    else:
        name = "another.weight"
        tensors[name] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / "other.safetensors")
    folder = tmp_path / "run"
    assert main([*QUICK, f"init={tmp_path / 'other.safetensors'}", f"hydra.run.dir={folder}"]) == 2
    assert f"for {name}" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("init", ["nowhere", ".", "model.bin"])
def test_a_path_without_a_model_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys, init):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    assert main([*QUICK, f"init={init}", "hydra.run.dir=run"]) == 2
    assert "a run folder, or a .safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_model_is_refused_with_something_that_works(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["scenario=digits", "rounds=1", "report=false", f"init={trained}", f"hydra.run.dir={folder}"]) == 2
    said = capsys.readouterr().err
    assert "a run with a complete checkpoint of the same scenario and model" in said
    assert "init=null" in said
    assert not folder.exists()
