"""Tasks with several target columns from the user's tables."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.errors import DataError, SettingError
from fedlearn.runner.start import main as simulate
from fedlearn.testing import check_scenario
from simulations.predict import main as predict
from simulations.scenarios.folder import folder

needs("torch")

EVENTS = {
    "numbers": ("0", "1", None),
    "decimals": ("0.0", "1.0", None),
    "truth": ("False", "True", None),
    "words": ("No", "YES", None),
    "status": ("alive", "dead", None),
    "classes": ("in remission", "relapse", ["in remission", "relapse"]),
    "codes": ("1", "2", [1, 2]),
}


def write_patients(path, *, no="0", yes="1", changes=(), names=("months", "died", "hospital")):
    rng = np.random.default_rng(3)
    months, died = rng.integers(1, 40, 60), rng.random(60) < 0.6
    rows = [
        [f"{rng.normal(60, 10):.1f}", "fm"[k % 2], str(months[k]), yes if died[k] else no, "abc"[k % 3]]
        for k in range(60)
    ]
    for row, column, value in changes:
        rows[row][column] = value
    path.write_text("\n".join([",".join(["age", "sex", *names]), *(",".join(row) for row in rows)]) + "\n")
    return np.stack([months, died], axis=1)


def pooled_targets(scenario):
    parts = [part for k in scenario.data.clients for part in (scenario.data.train(k).y, scenario.data.test(k).y)]
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", EVENTS)
def test_events_may_have_usual_values_or_named_classes(tmp_path, kind):
    no, yes, classes = EVENTS[kind]
    expected = write_patients(tmp_path / "x.csv", no=no, yes=yes)
    settings = {"task": "survival", "target": ["months", "died"], "client": "hospital", "classes": classes}
    found = pooled_targets(folder(path=tmp_path / "x.csv", **settings))
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))


def test_a_table_with_time_event_and_client_is_a_survival_scenario(tmp_path):
    write_patients(tmp_path / "x.csv", names=("t", "e", "region"))
    scenario = folder(path=tmp_path / "x.csv", task="survival", target=["t", "e"], client="region")
    check_scenario(lambda: scenario)
    assert scenario.data.train(0).x.shape[1] == 3  # age and two values of sex: neither time nor event is an input
    assert (scenario.data.task.name, len(scenario.data.clients)) == ("survival", 3)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        (2, "-1", "column months: a negative time"),
        (2, "", "column months: missing"),
        (2, "soon", "column months: not a number"),
        (3, "", "column died: missing"),
        (3, "2", "column died: neither of the values 0 or 1"),
        (3, "maybe", "column died: not a number"),
    ],
)
def test_a_wrong_time_or_event_is_refused_with_its_row(tmp_path, column, value, reason):
    write_patients(tmp_path / "x.csv", changes=[(4, column, value)])
    with pytest.raises(DataError, match=rf"(row|line) \d+, {reason}"):
        folder(path=tmp_path / "x.csv", task="survival", target=["months", "died"], client="hospital")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "survival", "target": "months"}, "two columns for task=survival"),
        ({"task": "survival", "target": ["months"]}, "two columns for task=survival"),
        ({"task": "survival", "target": ["died", "months"]}, "first the time, then the event"),
        ({"target": ["months", "died"]}, "survival .* or multilabel"),
        ({"task": "multilabel", "target": ["died", "died"]}, "different columns"),
        ({"task": "survivall", "target": "died"}, "one of binary"),
    ],
)
def test_targets_that_do_not_fit_the_task_are_refused(tmp_path, settings, message):
    write_patients(tmp_path / "x.csv")
    with pytest.raises(SettingError, match=message):
        folder(path=tmp_path / "x.csv", client="hospital", **settings)


def test_each_column_of_a_multilabel_task_is_a_label(tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (60, 3))
    lines = [f"{rng.normal():.3f},{'ab'[k % 2]},{','.join(map(str, row))}" for k, row in enumerate(labels)]
    (tmp_path / "x.csv").write_text("\n".join(["age,site,asthma,gout,flu", *lines]) + "\n")
    settings = {"task": "multilabel", "target": ["asthma", "gout", "flu"], "client": "site"}
    scenario = folder(path=tmp_path / "x.csv", **settings)
    check_scenario(lambda: scenario)
    assert sorted(map(tuple, pooled_targets(scenario))) == sorted(map(tuple, labels))
    assert scenario.preprocessing.target.classes == ("asthma", "gout", "flu")


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("task", ["survival", "multilabel"])
def test_a_trained_model_predicts_without_its_data(tmp_path, capsys, task, framework):
    needs(framework)
    write_patients(tmp_path / "x.csv")
    write_patients(tmp_path / "new.csv", names=("months", "relapse", "hospital"))
    target = "[months,died]" if task == "survival" else "[died]"
    run = [f"scenario.path={tmp_path / 'x.csv'}", f"scenario.task={task}", f"scenario.target={target}"]
    place = [f"hydra.run.dir={tmp_path / 'run'}", "rounds=2", f"framework={framework}", "callbacks.report=null"]
    assert simulate(["scenario=folder", "scenario.client=hospital", *run, *place]) == 0
    (tmp_path / "x.csv").unlink()
    model = fedlearn.load(tmp_path / "run")
    assert model.description.task.name == task
    assert len(model.predict(tmp_path / "new.csv")) == 60
    capsys.readouterr()
    assert predict([str(tmp_path / "run"), "--data", str(tmp_path / "new.csv")]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert head == ("prediction" if task == "survival" else "prediction,probability_died")
