"""A trained model outside of its run: files for other programs, and predictions."""

import csv
import io
import json

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from fedlearn.runner.experiment import build_scenario
from fedlearn.runner.run_config import read_run_config
from fedlearn.runner.start import main as run_main
from fedlearn.runner.trained_model import load_trained_model
from simulations.analysis.export import export
from simulations.export import main as export_main
from simulations.models import vision
from simulations.models.basic.torch import mlp
from simulations.predict import main as predict_main
from simulations.scenarios.digits import PIXELS


@pytest.fixture(scope="module", params=["torch", "jax"])
def digits(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("runs") / request.param
    words = ["scenario=digits", f"framework={request.param}", "rounds=2", "report=false"]
    assert run_main([*words, f"hydra.run.dir={folder}"]) == 0
    return folder


def some_images(folder):
    return build_scenario(read_run_config(folder)).data.test(0).x


def outputs(folder, x):
    model = load_trained_model(folder)
    return model.trainer.predict(model.params_D, x)


def test_safetensors_hold_the_named_parameters_and_tell_of_the_run(digits):
    path = export(digits)
    model = load_trained_model(digits)
    held = load_file(path)
    assert np.array_equal(model.layout.pack(held), model.params_D)
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["fedlearn"])
    assert (facts["scenario"], facts["round"], facts["task"]) == ("digits", 2, "multiclass")


def test_a_state_dict_loads_into_a_plain_module_and_predicts_the_same(digits, tmp_path):
    path = export(digits, "torch", tmp_path / "model.pt")
    module = mlp((64, 64, 10))
    module.load_state_dict(torch.load(path, weights_only=True))
    x = some_images(digits)
    with torch.inference_mode():
        assert np.allclose(module(torch.from_numpy(x)).numpy(), outputs(digits, x), atol=1e-5)


def test_the_statistics_that_were_averaged_are_in_the_state_dict(tmp_path):
    run = tmp_path / "run"
    words = ["scenario=digits", "model=bn_cnn", "buffers=average", "rounds=1", "report=false"]
    assert run_main([*words, f"hydra.run.dir={run}"]) == 0
    module, _ = vision.build_network("bn_cnn", "torch", input_shape=(8, 8, 1), num_outputs=10)
    module.load_state_dict(torch.load(export(run, "torch"), weights_only=True))
    assert (module.norm_0.running_var != 1).all()
    x = some_images(run)
    with torch.inference_mode():
        assert np.allclose(module.eval()(torch.from_numpy(x)).numpy(), outputs(run, x), atol=1e-5)


def test_a_model_whose_statistics_stayed_at_the_clients_is_not_handed_out(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["scenario=digits", "model=bn_cnn", "buffers=local", "rounds=1", "report=false"]
    assert run_main([*words, f"hydra.run.dir={run}"]) == 0
    assert "statistics local" in capsys.readouterr().out
    assert export_main([str(run)]) == 2
    assert "client is None\n  expected  a client with a personal model: 0, 1, 2" in capsys.readouterr().err
    assert export_main([str(run), "--client", "3"]) == 0


@pytest.mark.parametrize("words", [["buffers=average", "privacy=example", "privacy.noise_multiplier=1"], []])
def test_a_run_with_batch_norm_is_refused_before_its_first_round(tmp_path, capsys, words):
    words = ["scenario=digits", "model=bn_cnn", "report=false", f"hydra.run.dir={tmp_path / 'run'}", *words]
    assert run_main(words) == 2
    assert "norm_0.running_mean" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_onnx_gives_the_outputs_of_torch_for_any_number_of_examples(tmp_path, model):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    run = tmp_path / "run"
    assert run_main(["scenario=digits", f"model={model}", "rounds=1", "report=false", f"hydra.run.dir={run}"]) == 0
    session = onnxruntime.InferenceSession(export(run, "onnx"))
    for count in (1, 7):
        x = some_images(run)[:count]
        pixels = dict(zip(PIXELS, (x.reshape(count, 64) * 16.0).T, strict=True))
        (found,) = session.run(["outputs"], {name: column_N.astype(np.float64) for name, column_N in pixels.items()})
        assert np.abs(found - outputs(run, x)).max() < 1e-5


def test_predictions_are_those_of_the_model(digits, tmp_path, capsys):
    x = some_images(digits)[:5]
    np.save(tmp_path / "x.npy", x)
    header = ",".join(PIXELS)
    np.savetxt(tmp_path / "x.csv", x.reshape(5, 64) * 16, delimiter=",", header=header, comments="")
    expected = outputs(digits, x).argmax(axis=1)
    shown = []
    for name in ("x.npy", "x.csv"):
        assert predict_main([str(digits), "--data", str(tmp_path / name)]) == 0
        shown.append(list(csv.DictReader(io.StringIO(capsys.readouterr().out))))
    assert [int(row["prediction"]) for row in shown[0]] == expected.tolist()
    assert sum(float(shown[0][0][f"probability_{label}"]) for label in range(10)) == pytest.approx(1, abs=1e-4)
    assert [row["prediction"] for row in shown[0]] == [row["prediction"] for row in shown[1]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1,2\n3,4\n", "has no column pixel_0_0"),
        ("\n", "is empty"),
        ("1,2\n3\n", "row 2 has 1 cells"),
        (None, "is not a file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(digits, tmp_path, capsys, content, reason):
    path = tmp_path / "x.csv"
    if content:
        path.write_text(content)
    assert predict_main([str(digits), "--data", str(path)]) == 2
    shown = capsys.readouterr().err
    assert "x.csv" in shown
    assert reason in shown


def test_patients_are_read_as_people_have_them(tmp_path, capsys):
    run = tmp_path / "heart"
    assert run_main(["rounds=1", "report=false", f"hydra.run.dir={run}"]) == 0
    file = tmp_path / "patients.csv"
    head = "cp,age,sex,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal"  # in any order
    file.write_text(f"{head}\n4,63,1,145,233,1,2,150,0,2.3,3,0,6\n1,41,0,130,?,0,0,172,0,1.4,1,,3\n")
    capsys.readouterr()
    assert predict_main([str(run), "--data", str(file)]) == 0
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(first["probability_disease"]) > float(second["probability_disease"])
    file.write_text(f"{head}\n4,old,1,145,233,1,2,150,0,2.3,3,0,6\n")
    assert predict_main([str(run), "--data", str(file)]) == 2
    assert "patients.csv, row 2, column age: not a number" in capsys.readouterr().err
    file.write_text("age,sex\n50,1\n")
    assert predict_main([str(run), "--data", str(file)]) == 2
    assert "patients.csv has no column cp" in capsys.readouterr().err


def test_missing_values_are_not_passed_on(digits, tmp_path, capsys):
    x = some_images(digits)[:3].copy()
    x[1, 2, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    assert predict_main([str(digits), "--data", str(tmp_path / "x.npy")]) == 2
    assert "not finite in row 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["format=onxx"], "try       format=onnx"), (["formt=onnx"], "did you mean format=onnx?")],
)
def test_a_typo_is_told(digits, capsys, words, reason):
    assert export_main([str(digits), *words]) == 2
    assert reason in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert export_main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
