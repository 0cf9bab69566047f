"""A trained model stands on its own: it predicts without the training data, and as the run itself."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.callbacks.run_history import read_history
from fedlearn.data.preprocessing import Preprocessing
from fedlearn.errors import DataError, FedlearnError, SettingError
from fedlearn.runner.experiment import build_scenario
from fedlearn.runner.resume import resume
from fedlearn.runner.run_config import read_run_config
from fedlearn.runner.start import main as simulate
from simulations.predict import main as predict

needs("torch")

QUIET = ("report=false", "engine=serial")


def write_sites(path, *, num_rows=40):
    """Write two hospitals: a number with missing cells, a colour, an id, four classes and a cost."""
    rng = np.random.default_rng(3)
    path.mkdir(parents=True)
    for site in ("north", "south"):
        age, stage = rng.normal(55, 12, num_rows).round(1), rng.integers(1, 5, num_rows)
        colour = np.where(stage > 2, "red", np.where(rng.random(num_rows) < 0.3, "red", "blue"))
        cost = 3 * age + 100 * stage
        rows = [
            f"0{n},{a + 9 * s},{c},{s},{k}" for n, (a, c, s, k) in enumerate(zip(age, colour, stage, cost, strict=True))
        ]
        text = "\n".join(["patient,age,colour,stage,cost", *rows, f"0x,,{colour[0]},1,200", ""])
        (path / f"{site}.csv").write_text(text)
    return path


def run_folder(data, target, folder, *settings):
    ignore = {"stage": "[patient,cost]", "cost": "[patient]"}[target]
    words = [f"scenario.path={data}", f"scenario.target={target}", f"scenario.ignore={ignore}", *QUIET, *settings]
    assert simulate(["scenario=folder", *words, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Run a classification, and return its data and its run folder."""
    path = tmp_path_factory.mktemp("stages")
    data = write_sites(path / "data")
    return data, run_folder(data, "stage", path / "run", "rounds=4", "local.learning_rate=0.1")


@pytest.fixture
def new_rows(tmp_path):
    file = tmp_path / "new.csv"
    file.write_text("colour,patient,age\nred,007,61.5\nblue,008,\n,009,40\n")
    return file


def predictions(capsys, *arguments):
    capsys.readouterr()
    assert predict([*map(str, arguments)]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def refusal(capsys, *arguments):
    assert predict([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def change_nothing(data, run):
    return run


def add_rows(data, run):
    with (data / "north.csv").open("a") as file:
        file.write("1,300,red,4,900\n" * 40)
    return run


def add_category(data, run):
    with (data / "south.csv").open("a") as file:
        file.write("1,40,aqua,2,900\n")
    return run


def add_site(data, run):
    shutil.copy(data / "north.csv", data / "anew.csv")
    return run


def delete_data(data, run):
    shutil.rmtree(data)
    return run


def move_everything(data, run):
    shutil.rmtree(data)
    return run.rename(run.parent / "elsewhere")


def keep_model_only(data, run):
    shutil.rmtree(data)
    for entry in run.iterdir():
        if entry.name != "model":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return run


CHANGES = [add_rows, add_category, add_site, delete_data, move_everything, keep_model_only]


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_model_predicts_the_same_after_any_change_of_its_training_data(
    stages, new_rows, tmp_path, capsys, change
):
    data, run = stages
    before = predictions(capsys, run, "--data", new_rows)
    copies = shutil.copytree(data, tmp_path / "data"), shutil.copytree(run, tmp_path / "run")
    config = (copies[1] / "config.yaml").read_text().replace(str(data), str(copies[0]))
    (copies[1] / "config.yaml").write_text(config)
    assert predictions(capsys, change(*copies), "--data", new_rows) == before


def test_predictions_have_ids_and_the_names_of_classes(stages, new_rows, capsys):
    _, run = stages
    rows = predictions(capsys, run, "--data", new_rows, "--id", "patient")
    assert [row["patient"] for row in rows] == ["007", "008", "009"]
    names = [f"probability_{stage}" for stage in (1, 2, 3, 4)]
    assert list(rows[0]) == ["patient", "prediction", *names]
    assert {row["prediction"] for row in rows} <= {"1", "2", "3", "4"}
    assert sum(float(rows[0][name]) for name in names) == pytest.approx(1, abs=1e-4)
    assert "--id is ward" in refusal(capsys, run, "--data", new_rows, "--id", "ward")


def test_the_model_is_the_model_that_the_run_evaluated(stages):
    data, run = stages
    model, scenario = fedlearn.load(run), build_scenario(read_run_config(run))
    held_out = [scenario.data.test(client) for client in scenario.data.clients]
    x, y = np.concatenate([part.x for part in held_out]), np.concatenate([part.y for part in held_out])
    hits = model.predict(x) == np.array(model.classes, object)[y]
    assert hits.mean() == pytest.approx(read_history(run)[-1]["test"]["accuracy"], abs=1e-9)
    everything = np.concatenate([model.outputs(data / f"{site}.csv") for site in ("north", "south")])
    parts = [part(client).x for client in scenario.data.clients for part in (scenario.data.train, scenario.data.test)]
    expected = scenario.trainer.predict(model.params_D, np.concatenate(parts))
    np.testing.assert_allclose(np.sort(everything, axis=0), np.sort(expected, axis=0), atol=1e-5)


def test_a_file_a_data_frame_and_model_inputs_give_the_same_predictions(stages, new_rows):
    pandas = pytest.importorskip("pandas")
    model = fedlearn.load(stages[1])
    frame = pandas.read_csv(new_rows, dtype={"patient": str})
    columns = {"age": [61.5, None, 40], "colour": ["red", "blue", None]}
    (batch,) = model.batches(new_rows)
    for data in (str(new_rows), frame, columns, batch.x):
        assert model.predict(data).tolist() == model.predict(new_rows).tolist()
        np.testing.assert_allclose(model.predict_proba(data), model.predict_proba(new_rows))
    assert model.predict_proba(new_rows).shape == (3, 4)
    assert sum(parameter.numel() for parameter in model.module.parameters()) == len(model.params_D)
    with pytest.raises(DataError, match="expected  a data frame"):
        model.predict([[1.0, 2.0]])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_few_examples_are_in_memory_at_a_time(stages, new_rows, capsys, batch_size):
    _, run = stages
    sizes = [len(batch.x) for batch in fedlearn.load(run).batches(new_rows, batch_size=batch_size)]
    assert max(sizes) == batch_size
    assert sum(sizes) == 3
    batched = predictions(capsys, run, "--data", new_rows, "--batch-size", batch_size)
    assert batched == predictions(capsys, run, "--data", new_rows)


@pytest.mark.parametrize(
    ("text", "option", "reason"),
    [
        ("age,colour\n1,red\n2,aqua\n", "--allow-unknown", "row 3, column colour: not one of the categories blue, red"),
        ("age\n1\n", "--allow-missing", "has no column colour"),
    ],
)
def test_what_training_never_had_is_an_error_unless_allowed(stages, tmp_path, capsys, text, option, reason):
    _, run = stages
    file, out = tmp_path / "new.csv", tmp_path / "out.csv"
    file.write_text(text)
    out.write_text("earlier")
    error = refusal(capsys, run, "--data", file, "--out", out, "--batch-size", 1)
    assert reason in error
    assert option in error
    assert out.read_text() == "earlier"  # complete or unchanged, also if a later batch fails
    assert len(predictions(capsys, run, "--data", file, option)) == text.count("\n") - 1


def test_errors_and_predictions_of_a_regression_are_in_its_unit(tmp_path, capsys):
    data = write_sites(tmp_path / "data")
    run = run_folder(data, "cost", tmp_path / "run", "rounds=3", "baseline=[central,local]")
    model, scenario = fedlearn.load(run), build_scenario(read_run_config(run))
    target, held_out = model.target, [scenario.data.test(client) for client in scenario.data.clients]
    x, y = np.concatenate([part.x for part in held_out]), np.concatenate([part.y for part in held_out])
    error = model.predict(x) - (target.centre + target.spread * y)
    values = read_history(run)[-1]["test"]
    assert values["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
    assert values["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert values["rmse"] > 10  # not in standard deviations
    baselines = json.loads((run / "summary.json").read_text())["baselines"]
    assert min(part["test"]["rmse"] for part in baselines.values()) > 10
    assert "0.5, because the task has no threshold" in refusal(capsys, run, "--data", data, "--threshold", 0.2)


def test_a_threshold_moves_the_decision(tmp_path, capsys):
    run = tmp_path / "run"
    assert simulate(["scenario=heart", "rounds=1", *QUIET, f"hydra.run.dir={run}"]) == 0
    (tmp_path / "new.csv").write_text(
        "cp,age,sex,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal\n4,63,1,145,233,1,2,150,0,2.3,3,0,6\n"
    )
    (row,) = predictions(capsys, run, "--data", tmp_path / "new.csv")
    share = float(row["probability_disease"])
    for threshold, expected in ((share - 0.01, "disease"), (share + 0.01, "no disease")):
        (row,) = predictions(capsys, run, "--data", tmp_path / "new.csv", "--threshold", threshold)
        assert row["prediction"] == expected
    assert "threshold is 1.5" in refusal(capsys, run, "--data", tmp_path / "new.csv", "--threshold", 1.5)


@pytest.mark.parametrize("strategy", ["fedper", "ditto"])
def test_a_personalised_run_predicts_for_a_client_or_lists_the_clients(tmp_path, capsys, new_rows, strategy):
    data = write_sites(tmp_path / "data")
    run = run_folder(data, "stage", tmp_path / "run", "rounds=3", "local.learning_rate=0.1", f"strategy={strategy}")
    error = refusal(capsys, run, "--data", new_rows)
    assert "a client with a personal model: north, south" in error
    assert ("or global" in error) == (strategy == "ditto")
    scenario, line = build_scenario(read_run_config(run)), read_history(run)[-1]
    hits = []
    for client, name in scenario.data.names.items():
        model, test = fedlearn.load(run, client=name), scenario.data.test(client)
        hits += (model.predict(test.x) == np.array(model.classes, object)[test.y]).tolist()
    expected = line["personal"]["accuracy"]["pooled"] if strategy == "ditto" else line["test"]["accuracy"]
    assert np.mean(hits) == pytest.approx(expected, abs=1e-9)
    north, south = (fedlearn.load(run, client=name).params_D for name in ("north", "south"))
    assert not np.array_equal(north, south)
    if strategy == "ditto":
        assert fedlearn.load(run, client="global").parameters.client is None
    shutil.rmtree(data)
    assert len(predictions(capsys, run, "--data", new_rows, "--client", "south")) == 3


def test_a_run_with_one_model_takes_no_client(stages, new_rows, capsys):
    assert "all clients of this run share one model" in refusal(
        capsys, stages[1], "--data", new_rows, "--client", "north"
    )


CHANGED_FILES = {
    "a new row": (lambda text: text + "1,50,red,2,400\n", "rows of north.csv, column age of north.csv"),
    "a changed label": (lambda text: text.replace(",1,200", ",2,200"), "column stage of north.csv"),
    "a new column": (
        lambda text: "\n".join(f"{line},w" for line in text.splitlines()) + "\n",
        "column w of north.csv (new)",
    ),
}


@pytest.mark.parametrize("kind", CHANGED_FILES)
def test_a_resumed_run_refuses_changed_data_by_file_and_column(tmp_path, kind):
    data = write_sites(tmp_path / "data")
    run = run_folder(data, "stage", tmp_path / "run", "rounds=1")
    assert resume(run, ["rounds=2"]).exit_code == 0
    change, expected = CHANGED_FILES[kind]
    files = [data / "north.csv"] if kind != "a new column" else [data / "north.csv", data / "south.csv"]
    for file in files:
        file.write_text(change(file.read_text()))
    with pytest.raises(DataError) as caught:
        resume(run, ["rounds=3"])
    assert expected in str(caught.value)
    assert "south.csv" not in str(caught.value) or kind == "a new column"


def test_no_file_of_the_model_has_a_digest_of_rows(stages):
    _, run = stages
    digests = json.loads((run / "data_digests.json").read_text())
    rows = [digest for name, digest in digests.items() if name.startswith("column")]
    assert rows
    shared = b"".join(file.read_bytes() for file in (run / "model").iterdir())
    assert not [digest for digest in rows if digest.encode() in shared]


def hostile(content, path, value):
    *parents, last = path
    node = content
    for key in parents:
        node = node[key]
    node[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("inputs", "kind"), "os.system"),
        (("inputs", "columns"), []),
        (("inputs", "columns", 0, "kind"), "table"),
        (("inputs", "columns", 0, "spread"), 0),
        (("inputs", "columns", 0, "fill"), "1"),
        (("inputs", "columns", 0, "_target_"), "os.system"),
        (("inputs", "columns", 1, "levels"), "red"),
        (("inputs", "shape"), [10**9, 10**9]),
        (("target", "classes"), ["1", "1", "2", "3"]),
        (("target", "task"), "evil"),
        (("target", "spread"), 10**400),
    ],
)
def test_a_changed_description_is_refused_in_three_lines(stages, tmp_path, new_rows, path, value):
    copy = shutil.copytree(stages[1], tmp_path / "run")
    file = copy / "model" / "preprocessing.json"
    file.write_text(json.dumps(hostile(json.loads(file.read_text()), path, value)))
    with pytest.raises(DataError, match=r"preprocessing\.json cannot be read"):
        fedlearn.load(copy).predict(new_rows)


@pytest.mark.parametrize(
    "builder", ["os.system", "subprocess.run", "fedlearn.runner.instantiation.build", "shutil.rmtree"]
)
def test_a_model_file_cannot_name_code_that_is_not_allowed(stages, tmp_path, new_rows, builder):
    copy = shutil.copytree(stages[1], tmp_path / "run")
    file = copy / "model" / "model.json"
    content = json.loads(file.read_text())
    content["network"]["builder"] = builder
    content["settings"]["allow_targets"] = ["os", "subprocess", "shutil"]  # the file cannot allow it either
    file.write_text(json.dumps(content))
    with pytest.raises(SettingError):
        fedlearn.load(copy).predict(new_rows)


def test_parameters_of_another_network_are_refused(stages, tmp_path, new_rows):
    copy = shutil.copytree(stages[1], tmp_path / "run")
    file = copy / "model" / "model.json"
    content = json.loads(file.read_text())
    content["network"]["arguments"]["hidden"] = [31]
    file.write_text(json.dumps(content))
    with pytest.raises(FedlearnError, match="other parameters than the trained model"):
        fedlearn.load(copy).predict(new_rows)


def test_settings_alone_describe_the_model_of_a_deployed_run(tmp_path):
    from simulations.scenarios.folder import declared_model, folder

    data = write_sites(tmp_path / "data")
    settings = {
        "path": data,
        "target": "cost",
        "ignore": ["patient"],
        "task": "regression",
        "scale": "constants",
        "scales": {"stage": [2, 1], "cost": [400, 100], "age": [60, 20]},
        "categories": {"colour": ["blue", "red"]},
        "clients": ["north", "south"],
    }
    scenario = folder(**settings)
    preprocessing, network = declared_model({**settings, "path": None})
    assert preprocessing == scenario.preprocessing
    assert network == scenario.network
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    assert declared_model({**settings, "scale": "none"}) is None
    classes = {**settings, "target": "stage", "task": None, "ignore": ["patient", "cost"]}
    assert declared_model(classes) is None
    classes["classes"] = [1, 2, 3, 4]
    assert declared_model(classes)[0] == folder(**classes).preprocessing


def test_the_order_of_columns_in_a_file_does_not_change_the_features_of_constants(tmp_path):
    from simulations.scenarios.folder import folder

    settings = {"target": "y", "scale": "constants", "clients": ["a", "b"], "classes": [0, 1]}
    settings["scales"] = {"height": [150, 10], "age": [50, 10]}
    (tmp_path / "a.csv").write_text("age,height,y\n60,170,0\n60,170,1\n")
    (tmp_path / "b.csv").write_text("height,y,age\n170,1,60\n170,0,60\n")
    for name in "ab":  # each node reads its file only
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / f"{name}.csv", tmp_path / name)
    first, second = (folder(path=tmp_path / name, **settings).data for name in "ab")
    assert np.array_equal(first.train(0).x, second.train(1).x)
