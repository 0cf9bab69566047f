from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from needs import needs

from fedlearn.core.privacy_ledger import Event, Ledger
from fedlearn.data.partition import Iid, Natural, Time
from fedlearn.errors import DataError, SettingError
from fedlearn.runner.start import main as simulate
from fedlearn.testing import check_scenario
from simulations.predict import main as predict
from simulations.scenarios.folder import folder

needs("torch")

RNG = np.random.default_rng(11)
SITES = ("north", "south", "west")
CONSTANTS = {
    "scale": "constants",
    "scales": {"age": [50, 10], "pressure": [130, 20]},
    "categories": {"sex": ["f", "m"]},
    "classes": ["no", "yes"],
    "clients": SITES,
}
UNSCALED = {"scale": "none", "categories": {"sex": ["f", "m"]}}


def rows(count=40):
    age = RNG.normal(55, 12, count).round(1)
    sick = np.where(age + RNG.normal(0, 8, count) > 55, "yes", "no")
    sex, pressure = RNG.choice(["f", "m"], count), RNG.normal(130, 20, count).round()
    return [",".join(map(str, row)) for row in zip(age, sex, pressure, sick, strict=True)]


@pytest.fixture(scope="session")
def clinics(tmp_path_factory) -> Path:
    """Write one CSV file for each of three clinics, with a few missing values."""
    path = tmp_path_factory.mktemp("clinics")
    for site in SITES:
        text = "\n".join(["age,sex,pressure,sick", *rows(), "61.0,,?,yes", "40.0,f,,no", ""])
        (path / f"{site}.csv").write_text(text)
    return path


def sizes(data):
    return [(len(data.train(client)), len(data.test(client))) for client in data.clients]


def changed(clinics, tmp_path, old, new, *, file="south.csv"):
    path = shutil.copytree(clinics, tmp_path / "changed")
    (path / file).write_text((path / file).read_text().replace(old, new, 1))
    return path


def test_a_folder_of_tables_is_a_problem_with_a_client_for_each(clinics):
    scenario = folder(path=clinics, target="sick")
    assert scenario.model == "mlp 4-32-1"  # age, two sexes, pressure
    assert scenario.data.task.name == "binary"
    assert [scenario.data.name(client) for client in scenario.data.clients] == list(SITES)
    assert sizes(scenario.data) == [(31, 11)] * 3
    assert scenario.data.source == f"{clinics.name} · scaled by exact statistics of 3 clients"


@pytest.mark.parametrize("partition", ["natural", "shards"])
def test_a_folder_keeps_the_contract_of_scenarios(clinics, partition):
    check_scenario(lambda: folder(path=clinics, target="sick", partition=partition))


def test_federated_scales_are_those_of_training_rows_and_missing_values_sit_at_the_centre(clinics):
    data = folder(path=clinics, target="sick").data
    x = np.concatenate([data.train(client).x for client in data.clients])
    assert abs(x[:, 0].mean()) < 1e-6
    assert x[:, 0].std() == pytest.approx(1, abs=1e-5)
    everyone = np.concatenate([x, *(data.test(client).x for client in data.clients)])
    assert (everyone[:, 3] == 0).sum() >= 6  # two missing pressures at each clinic
    assert (everyone[:, 1:3].sum(axis=1) == 0).sum() == 3  # a missing sex at each


def test_what_is_held_out_does_not_move_the_scales(clinics, tmp_path):
    path = tmp_path / "split"
    for site in SITES:
        (path / site).mkdir(parents=True)
        shutil.copyfile(clinics / f"{site}.csv", path / site / "train.csv")
        (path / site / "test.csv").write_text("age,sex,pressure,sick\n1e6,other,130,no\n")
    split, whole = (
        folder(path=path, target="sick").data,
        folder(path=clinics, target="sick", partition=Natural(test_share=0)).data,
    )
    assert sizes(split) == [(42, 1)] * 3
    assert np.array_equal(split.train(1).x, whole.train(1).x)
    assert split.test(0).x[0, 0] > 1000
    assert split.test(0).x[0, 1:3].tolist() == [0, 0]  # a category without training examples counts as missing


def test_a_node_with_its_own_file_only_has_what_it_has_in_a_simulation(clinics, tmp_path):
    shutil.copyfile(clinics / "south.csv", tmp_path / "south.csv")
    everyone = folder(path=clinics, target="sick", **CONSTANTS)
    alone = folder(path=tmp_path, target="sick", **CONSTANTS)
    assert sizes(alone.data) == [(0, 0), (31, 11), (0, 0)]
    assert np.array_equal(alone.data.train(1).x, everyone.data.train(1).x)
    assert np.array_equal(alone.data.test(1).y, everyone.data.test(1).y)
    assert alone.trainer.layout.digest == everyone.trainer.layout.digest


@pytest.mark.parametrize(
    "changes", [{"clients": None}, {"scale": "federated"}, {"classes": None}, {"partition": "iid"}]
)
def test_at_a_real_node_nothing_may_depend_on_which_rows_are_there(clinics, changes):
    assert folder(path=clinics, target="sick", **CONSTANTS, deployed=True).data.num_classes == 2
    with pytest.raises(SettingError, match=r"clients|scale|classes"):
        folder(path=clinics, target="sick", **{**CONSTANTS, **changes}, deployed=True)


@pytest.mark.parametrize(
    ("without", "setting"), [("classes", "classes"), ("scales", "scales"), ("categories", "scales"), ("scale", "scale")]
)
def test_a_node_that_cannot_know_says_which_setting_must(clinics, tmp_path, without, setting):
    shutil.copyfile(clinics / "south.csv", tmp_path / "south.csv")
    given = {name: value for name, value in CONSTANTS.items() if name != without}
    with pytest.raises(SettingError) as caught:
        folder(path=tmp_path, target="sick", **given)
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("old", "new", "settings", "reason"),
    [
        (",f,", ",x,", CONSTANTS, r"south\.csv, row \d+, column sex: not one of the categories f, m"),
        ("\n61.0,", "\n6l.0,", CONSTANTS, r"south\.csv, row 42, column age: not a number"),
        ("\n61.0,", "\n6l.0,", {}, r"south\.csv, row 42, column age: not a number"),
        (",yes\n40.0", ",\n40.0", {}, r"south\.csv, row 42, column sick: missing, but it is the target"),
        (",yes\n40.0", ",maybe\n40.0", CONSTANTS, r"south\.csv, row 42, column sick: not one of the classes no, yes"),
        (
            "age,",
            "age,",
            {"scale": "none", "categories": {"sex": ["f", "m"]}},
            r"north\.csv, row 42, column pressure: missing",
        ),
        ("age,", "years,", {}, r"south\.csv has no column age, which north\.csv has"),
    ],
)
def test_a_cell_that_does_not_fit_is_named_by_file_row_and_column(clinics, tmp_path, old, new, settings, reason):
    path = changed(clinics, tmp_path, old, new)
    with pytest.raises(DataError, match=reason) as caught:
        folder(path=path, target="sick", **settings)
    assert re.search(r"(try    |advice )", str(caught.value))
    assert "6l" not in str(caught.value)  # the error does not contain the value of a cell


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"path": None}, "path"),
        ({"target": None}, "target"),
        ({"scale": "federatd"}, "scale"),
        ({"clients": ["north", "south"]}, "clients"),
        ({"partition": Natural(num_clients=4)}, "partition.num_clients"),
        ({"partition": "time"}, "partition"),
        ({"task": "binary", "classes": ["no", "yes", "maybe"]}, "task"),
        ({"scale": "constants", "scales": {"age": [50, 0]}, "categories": {"sex": ["f"]}}, "scales.age"),
    ],
)
def test_a_folder_setting_out_of_range_is_named(clinics, settings, setting):
    with pytest.raises(SettingError) as caught:
        folder(**{"path": clinics, "target": "sick"} | settings)
    assert caught.value.setting == setting


def test_an_unknown_column_is_guessed(clinics):
    with pytest.raises(DataError, match=r"scenario\.target is sik\n.*\n  try       scenario\.target=sick"):
        folder(path=clinics, target="sik")


def test_a_column_of_names_is_no_category(tmp_path):
    lines = ["name,age,sick", *(f"patient {n},{n},{n % 2}" for n in range(80))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"column name has \d+ different values(.|\n)*scenario\.ignore=\[name\]"):
        folder(path=tmp_path / "a.csv", target="sick", partition="iid")
    scenario = folder(path=tmp_path / "a.csv", target="sick", partition=Iid(num_clients=4), ignore=["name"])
    assert scenario.model == "mlp 1-32-1"
    assert len(scenario.data.clients) == 4


@pytest.mark.parametrize(
    ("cells", "task", "classes"),
    [
        (["no", "yes"], "binary", 2),
        (["a", "b", "c"], "multiclass", 3),
        ([0, 1, 10, 2], "multiclass", 4),
        ([0.5, 1.5], "regression", 1),
        (list(range(30)), "regression", 1),
    ],
)
def test_the_task_follows_from_the_target(tmp_path, cells, task, classes):
    lines = ["x,y", *(f"{n},{cells[n % len(cells)]}" for n in range(60))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    data = folder(path=tmp_path / "a.csv", target="y", partition=Iid(num_clients=2, test_share=0)).data
    assert (data.task.name, data.num_classes) == (task, classes)
    assert data.train(0).y.max() < 40
    if task == "regression":
        together = np.concatenate([data.train(client).y for client in data.clients])
        assert together.mean() == pytest.approx(0, abs=1e-6)
        assert "target: minus" in data.source


def test_one_table_is_divided_by_a_column_or_by_time(tmp_path):
    lines = ["site,day,x,y", *(f"{'ab'[n % 2]},2026-01-{28 - n:02d},{n},{n % 2}" for n in range(28))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    by_site = folder(
        path=tmp_path / "a.csv", target="y", client="site", ignore=["day"], partition=Natural(test_share=0)
    ).data
    assert [by_site.name(client) for client in by_site.clients] == ["a", "b"]
    assert set(by_site.train(0).y) == {0}
    by_time = folder(
        path=tmp_path / "a.csv", target="y", ignore=["site"], partition=Time(num_clients=4, test_share=0),
        order_by="day", scale="none",
    ).data  # fmt: skip
    assert sorted(by_time.train(0).x.ravel().tolist()) == [*range(21, 28)]
    assert by_time.train(0).x.shape == (7, 1)  # the day is not a feature


def test_texts_are_hashed_so_that_no_vocabulary_is_learned(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "good day\tpos\nbad day\tneg\n\tneg\n" * 8)
    scenario = folder(path=tmp_path / "a.tsv", target="label", text="text", partition=Iid(num_clients=2, test_share=0))
    x = np.concatenate([scenario.data.train(client).x for client in scenario.data.clients])
    assert x.shape == (24, 4096)
    assert set(np.linalg.norm(x, axis=1).round(6)) == {0, 1}
    assert scenario.data.source == "a.tsv · words of text, hashed"


@pytest.mark.parametrize("framework", ["torch", "jax", "mixed"])
def test_images_of_classes_and_clients_are_learned_in_either_framework(tmp_path, framework):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    if framework != "torch":
        pytest.importorskip("jax")
    for site in ("a", "b"):
        for colour, kind in ((10, "cat"), (200, "dog")):
            for number in range(4):
                (tmp_path / site / kind).mkdir(parents=True, exist_ok=True)
                image.new("L", (8, 8), colour + number).save(tmp_path / site / kind / f"{number}.png")
    scenario = folder(path=tmp_path, model="cnn", framework=framework)
    assert sizes(scenario.data) == [(6, 2), (6, 2)]
    assert scenario.data.train(0).x.max() <= 1
    assert scenario.model == "cnn 8x8x1-16-32-1"


def test_a_model_of_images_says_what_new_ones_are(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    from fedlearn.runner.start import main
    from simulations.predict import main as predict

    for colour, kind in ((10, "cat"), (200, "dog")):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for number in range(8):
            image.new("L", (8, 8), colour + number).save(tmp_path / "pets" / kind / f"{number}.png")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("not an image")
    image.new("RGB", (30, 20), (205, 205, 205)).save(tmp_path / "new" / "a dog.jpg")  # other size, kind and mode
    image.new("L", (8, 8), 12).save(tmp_path / "new" / "b.png")
    run = str(tmp_path / "run")
    words = [f"scenario.path={tmp_path / 'pets'}", "partition=iid", "partition.num_clients=2", "model=linear"]
    assert main(["scenario=folder", *words, "rounds=30", "report=false", f"hydra.run.dir={run}"]) == 0
    capsys.readouterr()
    assert predict([run, "--data", str(tmp_path / "new")]) == 0
    shown = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in shown] == [["file", "prediction"], ["a dog.jpg", "dog"], ["b.png", "cat"]]
    assert predict([run, "--data", str(tmp_path / "new" / "b.png")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split(",") == shown[2]
    for wrong, why in (
        ("new/notes.txt", "neither an image nor a folder of images"),
        ("pets", "is not a file"),
        ("no.png", "is not a file"),
    ):
        assert predict([run, "--data", str(tmp_path / wrong)]) == 2
        assert why in capsys.readouterr().err


def test_a_run_of_a_folder_learns(clinics, tmp_path, capfd):
    from fedlearn.runner.start import main

    words = [f"scenario.path={clinics}", "scenario.target=sick", "rounds=8", "report=false", "engine=serial"]
    assert main(["scenario=folder", *words, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert "scaled by exact statistics of 3 clients" in capfd.readouterr().out
    words = [*words[:2], "scenario.scale=constants", "scenario.scales={age:[50,10],pressure:[130,20]}"]
    assert main(["scenario=folder", *words, "rounds=1", f"hydra.run.dir={tmp_path / 'other'}"]) == 2
    assert "sex has neither" in capfd.readouterr().err


NOISY = {
    "noise_multiplier": 0.5,
    "bounds": {"age": [0, 110], "pressure": [50, 250]},
    "categories": {"sex": ["f", "m"]},
}


def test_noisy_statistics_are_paid_for_by_each_client(clinics):
    exact, noisy = folder(path=clinics, target="sick"), folder(path=clinics, target="sick", **NOISY)
    assert exact.ledger == Ledger()
    assert exact.disclosure.startswith("exact counts")
    assert [noisy.ledger.client_history(client) for client in range(3)] == [((Event(0.5), 1),)] * 3
    assert "scaled by noisy statistics of 3 clients (noise multiplier 0.5)" in noisy.data.source
    little = folder(path=clinics, target="sick", **{**NOISY, "noise_multiplier": 0.02})
    near, far = little.data.train(0).x, exact.data.train(0).x
    assert 0 < np.abs(near - far).max() < 0.5


@pytest.mark.parametrize(
    ("left_out", "setting"), [("bounds", "column age needs bounds or categories"), ("categories", "column sex needs")]
)
def test_noisy_statistics_need_public_bounds(clinics, left_out, setting):
    with pytest.raises(DataError, match=setting):
        folder(path=clinics, target="sick", **{**NOISY, left_out: None})
    with pytest.raises(SettingError, match=r"noise_multiplier is 0\.5"):
        folder(path=clinics, target="sick", **CONSTANTS, noise_multiplier=0.5)


def protected_by(kind, scenario):
    from fedlearn.runner.compose import compose
    from fedlearn.runner.experiment import apply_privacy
    from fedlearn.runner.plan import build_plan
    from fedlearn.runner.start import parse_args

    words = ["strategy.weighting=equal"] if kind == "central" else []
    (job,) = compose(parse_args(["scenario=folder", *words, f"privacy={kind}", "privacy.noise_multiplier=1"]))
    return apply_privacy(build_plan(job.cfg), scenario).strategy.privacy_guarantee


def test_a_promise_about_examples_covers_noisy_statistics_and_no_others(clinics):
    pytest.importorskip("dp_accounting")
    exact, noisy = folder(path=clinics, target="sick"), folder(path=clinics, target="sick", **NOISY)
    for kind, scenario in (("example", exact), ("central", exact), ("central", noisy)):
        protection = protected_by(kind, scenario)
        assert scenario.disclosure in protection.not_covered
        assert protection.initial_ledger == Ledger()
    protection = protected_by("example", noisy)
    assert noisy.disclosure not in protection.not_covered
    assert protection.epsilon_of(protection.initial_ledger).value > 1


def test_a_run_starts_with_what_its_statistics_have_cost(clinics, tmp_path, capfd):
    pytest.importorskip("opacus")
    pytest.importorskip("dp_accounting")
    from fedlearn.runner.start import main

    words = [f"scenario.path={clinics}", "scenario.target=sick", "rounds=1", "report=false", "engine=serial"]
    words += ["scenario.noise_multiplier=5", "scenario.bounds={age:[0,110],pressure:[50,250]}"]
    words += ["scenario.categories={sex:[f,m]}", "privacy=example", "privacy.noise_multiplier=20"]
    assert main(["scenario=folder", *words, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    seen = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert seen["epsilon"] > 0.7  # the statistics cost most of it: a round with noise 20 alone is below 0.2


def test_one_table_of_nobody_in_particular_says_how_to_divide_it(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,0\n2,1\n")
    with pytest.raises(SettingError, match=r"partition is natural\n.*\n.*partition='iid'"):
        folder(path=tmp_path / "a.csv", target="y")
    (tmp_path / "a.csv").write_text("x,y\n1,a\n2,a\n")
    with pytest.raises(SettingError, match=r"classes is \['a'\]\n  expected  two or more classes, each once"):
        folder(path=tmp_path / "a.csv", target="y", partition=Iid(num_clients=2))


def test_a_node_does_not_guess_the_task_by_its_own_rows(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,0\n2,1\n3,2\n")
    said = {"path": tmp_path, "target": "y", "clients": ["a", "b"], "scale": "none"}
    with pytest.raises(SettingError, match=r"classes is None\n.*scenario\.task=regression"):
        folder(**said)
    assert folder(**said, task="regression").data.num_classes == 1
    assert folder(**said, classes=[0, 1, 2, 3]).data.num_classes == 4
    with pytest.raises(SettingError, match="each once"):
        folder(**said, classes=[0, 1, 1.0])


def test_a_trained_model_predicts_for_rows_of_a_new_table_in_the_units_of_the_target(tmp_path, capsys):
    rng = np.random.default_rng(1)
    x = rng.normal(50, 10, (120, 2))
    lines = [f"{a:.4f},{b:.4f},{3 * a + 100:.4f}" for a, b in x]
    for name, part in (("north", lines[:60]), ("south", lines[60:])):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{name}.csv").write_text("\n".join(["age,weight,cost", *part]) + "\n")
    words = ["scenario=folder", f"scenario.path={tmp_path / 'data'}", "scenario.target=cost", "model=linear"]
    assert simulate([*words, "rounds=20", "report=false", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    (tmp_path / "new.csv").write_text("weight,age\n50,40\n50,60\n")  # in another order
    capsys.readouterr()
    assert predict([str(tmp_path / "run"), "--data", str(tmp_path / "new.csv")]) == 0
    low, high = (float(row) for row in capsys.readouterr().out.split()[1:])
    assert low == pytest.approx(220, rel=0.05)
    assert high == pytest.approx(280, rel=0.05)
    (tmp_path / "new.csv").write_text("age\n40\n")
    assert predict([str(tmp_path / "run"), "--data", str(tmp_path / "new.csv")]) == 2
    assert "new.csv has no column weight" in capsys.readouterr().err


def test_a_held_out_client_is_evaluated_apart_and_moves_nothing(clinics, tmp_path):
    settings = {"scenario.path": clinics, "scenario.target": "sick", "rounds": 2, "report": "false"}
    words = [f"{name}={value}" for name, value in settings.items()]
    for name, extra in (("with", ["scenario.held_out_clients=[west]"]), ("without", [])):
        folder_of_run = tmp_path / name
        path = clinics
        if name == "without":
            path = tmp_path / "two"
            path.mkdir()
            for site in SITES[:2]:
                shutil.copyfile(clinics / f"{site}.csv", path / f"{site}.csv")
        line = ["scenario=folder", *words, f"scenario.path={path}", *extra, f"hydra.run.dir={folder_of_run}"]
        assert simulate(line) == 0
    metrics = [
        [json.loads(line)["test"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    ]
    assert metrics[0] == metrics[1]  # neither scales nor rounds depend on the held-out client
    rows = (tmp_path / "with" / "clients.csv").read_text().splitlines()
    assert rows[0].endswith(",held_out")
    assert [row.split(",")[1] + row[-1] for row in rows[1:]] == ["north0", "south0", "west1"]
    held_out = (tmp_path / "with" / "held_out.csv").read_text().splitlines()
    assert held_out[0] == "client,file,rows"
    assert held_out[-1] == "west,west.csv,2-43"


def test_a_deployment_refuses_held_out_clients(clinics):
    with pytest.raises(SettingError, match="held_out_clients"):
        folder(path=clinics, target="sick", **CONSTANTS, deployed=True, held_out_clients=["west"])
