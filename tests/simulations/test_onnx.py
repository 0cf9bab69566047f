"""An ONNX file of a table has the preprocessing, and predicts as the model from which it was exported."""

import json

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.data.column_types import Category, Number
from fedlearn.data.inputs import ArrayInputs, TableInputs
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.tables import table_from_columns
from fedlearn.runner.start import main as simulate
from simulations.analysis.export import export

needs("torch")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

COLUMNS = (
    Number(name="age", centre=55.0, spread=10.0, fill=55.0),
    Category(name="colour", levels=("blue", "red", "green")),
    Number(name="pressure", centre=130.0, spread=-20.0, fill=120.0, zero_is_missing=True),
    Number(name="potassium", centre=4.25, spread=0.75, fill=4.25, scaling="arcsinh"),
    Number(name="count", centre=0.5, spread=float(np.log1p(25)), fill=0.0, scaling="log1p"),
    Number(name="code", centre=0.3, spread=0.7, equals=2.0),
    Number(name="code", centre=0.1, spread=0.4, equals=3.0),
    Number(name="outputs"),  # also the name of an output
)


def identity_file(path, num_features):
    """Write an ONNX file whose network returns its inputs."""
    from onnx import TensorProto, helper, save

    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", num_features]) for name in ("x", "outputs")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["outputs"])], "network", info[:1], info[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_the_graph_transforms_every_kind_of_column_as_the_preprocessing_does(tmp_path, task):
    from simulations.analysis.onnx_graph import add_preprocessing

    rng, count = np.random.default_rng(5), 200
    inputs = TableInputs(columns=COLUMNS)
    classes = tuple(f"class {k}" for k in range(inputs.num_features)) if task == "multiclass" else ()
    target = Target(task=task, classes=classes, centre=7.0 * (task == "regression"), spread=3.0 if not classes else 1.0)
    preprocessing = Preprocessing(inputs=inputs, target=target)
    identity_file(tmp_path / "model.onnx", inputs.num_features)
    add_preprocessing(tmp_path / "model.onnx", preprocessing, {"preprocessing": preprocessing.to_json()})

    numbers = {column.name: rng.normal(40, 60, count) for column in COLUMNS if isinstance(column, Number)}
    numbers |= {"count": rng.integers(0, 26, count) * 1.0, "code": rng.integers(1, 5, count) * 1.0}
    for name in ("age", "pressure", "potassium", "count"):
        numbers[name][::7] = np.nan
    numbers["pressure"][1::7] = 0
    feed = {**numbers, "colour": rng.choice(["red", "blue", "green", "aqua"], count).astype(object)}
    x = inputs.transform(table_from_columns(feed), allow_unknown=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found, prediction = session.run(["model_outputs", "prediction"], feed)
    np.testing.assert_allclose(found, x, rtol=2e-6, atol=2e-7)
    if classes:
        assert prediction.tolist() == [classes[number] for number in target.class_numbers(x)]
    else:
        np.testing.assert_allclose(prediction, target.values(x), rtol=1e-6)
    assert session.get_modelmeta().custom_metadata_map["preprocessing"] == preprocessing.to_json()


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(inputs=TableInputs(columns=COLUMNS), target=Target(task="binary", classes=("a\n", "ö;"))),
        Preprocessing(
            inputs=TableInputs(columns=COLUMNS[:1], shape=(1, 1)), target=Target(task="regression", centre=-1.5)
        ),
        Preprocessing(inputs=ArrayInputs(shape=(2, 3)), target=Target(task="ranking")),
    ],
)
def test_a_description_is_read_back_from_its_json(preprocessing):
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    assert json.loads(preprocessing.to_json())["inputs"]["kind"] in ("table", "arrays")


@pytest.mark.parametrize("checked", ["classes", pytest.param("cost", marks=pytest.mark.slow)])
def test_an_exported_table_predicts_as_the_model(tmp_path, checked):
    rng, classes = np.random.default_rng(1), checked == "classes"
    (tmp_path / "data").mkdir()
    for site in "ab":
        age, colour = rng.normal(50, 9, 60), rng.choice(["red", "blue"], 60)
        stage = rng.integers(1, 5, 60) if classes else age * 3 + 0.5
        rows = [f"{a:.3f},{c},{s}" for a, c, s in zip(age, colour, stage, strict=True)]
        (tmp_path / f"data/{site}.csv").write_text("\n".join(["age,colour,stage", *rows, ""]))
    settings = ["scenario=folder", f"scenario.path={tmp_path / 'data'}", "scenario.target=stage", "rounds=2"]
    assert simulate([*settings, "report=false", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    feed = {"age": np.array([31.5, np.nan, 70]), "colour": np.array(["red", "blue", "red"], object)}
    model = fedlearn.load(tmp_path / "run")
    session = onnxruntime.InferenceSession(export(tmp_path / "run", "onnx"))
    names = [output.name for output in session.get_outputs()]
    assert names == ["outputs", "prediction", *(["probabilities"] if classes else [])]
    found = dict(zip(names, session.run(names, feed), strict=True))
    if classes:
        assert found["prediction"].tolist() == model.predict(feed).tolist()
        np.testing.assert_allclose(found["probabilities"], model.predict_proba(feed), atol=1e-6)
    else:
        np.testing.assert_allclose(found["prediction"], model.predict(feed), rtol=1e-5)
