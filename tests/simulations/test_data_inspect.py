"""The command ``data inspect``, its schema, the check at the start of a run, and its absence at a node."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.callbacks import data_check as view
from fedlearn.core.command_line import exit_code
from fedlearn.data.data_check import run_check
from fedlearn.data.data_check.inspection import inspect_path
from fedlearn.data.schema_files import read_schema
from fedlearn.data.table_settings import TableSettings
from fedlearn.runner.start import main as simulate
from simulations import data as command
from simulations.scenarios.folder import folder

needs("torch")

SITES = ("lyon", "nice", "paris")
CANARY = "Zebra7391"  # a level that must not leave a node


def rows(site, rng, count):
    for number in range(count):
        age, is_left = rng.normal(60, 9), rng.random() < 0.5
        glucose = rng.normal(5.6, 0.8) * (18 if site == "lyon" else 1)
        weight = "NA" if number == 3 else f"{rng.normal(75, 9):.1f}".replace(".", ",")
        side, sick = ("left" if is_left else "right"), ("yes" if age + rng.normal(0, 9) > 60 else "no")
        yield f"{age:.0f};{glucose:.2f}".replace(".", ",") + f";{weight} kg;{side};{number:03d};{sick}"


@pytest.fixture(scope="module")
def clinics(tmp_path_factory):
    """Write one file with decimal commas for each site; one site has another unit."""
    path, rng = tmp_path_factory.mktemp("clinics"), np.random.default_rng(4)
    for site in SITES:
        lines = ["age;glucose;weight;side;code;sick", *rows(site, rng, 60)]
        (path / f"{site}.csv").write_text("\n".join(lines).replace("NA kg", "NA") + "\n")
    return path


def test_the_command_shows_columns_and_flags(clinics, tmp_path, capsys):
    file = tmp_path / "check.json"
    assert command.main(["inspect", str(clinics), "target=sick", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"glucose +number, decimal comma +6\.\d+", shown)
    assert re.search(r"weight +number, decimal comma, unit kg", shown)
    assert "units: glucose: median" in shown
    assert "note: weight: NA (3) counts as missing" in shown
    check = json.loads(file.read_text())
    assert [flag["kind"] for flag in check["flags"]] == ["units", "many levels"]
    assert [len(column["sites"]) for column in check["columns"]] == [3] * 6


def test_only_strict_gives_exit_code_1_for_flags(clinics, capsys):
    assert command.main(["inspect", str(clinics), "target=sick"]) == 0
    assert command.main(["inspect", str(clinics), "target=sick", "--strict"]) == 1
    assert command.main(["inspect", str(clinics), "target=sick", "ignore=[code,glucose]", "--strict"]) == 0


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["nowhere"], "PATH is nowhere: no such file or folder"),
        (["PATH", "target=sik"], "target is sik"),
        (["PATH", "targets=sick"], "targets=sick is not a setting of this command"),
        (["PATH", "target=sick", "ignore=[cod]"], "ignore is cod"),
    ],
)
def test_an_error_has_three_lines_and_exit_code_2(clinics, capsys, words, first):
    words = [str(clinics) if word == "PATH" else word for word in words]
    assert exit_code(lambda: command.main(["inspect", *words])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == first
    assert len(lines) == 3


def test_advice_works_as_typed_and_removes_the_flag(clinics, capsys):
    import shlex

    before = check_of(clinics, "target=sick", capsys=capsys)
    for flag in before["flags"]:
        [word] = shlex.split(flag["advice"])
        after = check_of(clinics, "target=sick", word, capsys=capsys)
        assert (flag["kind"], flag["column"]) not in {(f["kind"], f["column"]) for f in after["flags"]}


def check_of(path, *words, capsys):
    file = path.parent / "one.json"
    assert command.main(["inspect", str(path), *words, "--json", str(file)]) == 0
    capsys.readouterr()
    return json.loads(file.read_text())


def test_a_run_with_the_written_schema_equals_a_run_without_it(clinics, tmp_path, capsys):
    file = tmp_path / "schema.yaml"
    words = ["inspect", str(clinics), "target=sick", "ignore=[code]", "--write-schema", str(file)]
    assert command.main(words) == 0
    assert str(file) in capsys.readouterr().out
    schema = read_schema(file)
    assert (schema.target, schema.columns["code"].type) == ("sick", "ignore")
    assert schema.columns["weight"].unit == "kg"
    assert all(column.range is None and column.scale is None for column in schema.columns.values())
    plain, stated = folder(path=clinics, target="sick", ignore=["code"]), folder(path=clinics, schema=str(file))
    assert plain.preprocessing.target == stated.preprocessing.target
    for client in plain.data.clients:
        for part in ("train", "test"):
            left, right = (getattr(scenario.data, part)(client) for scenario in (plain, stated))
            np.testing.assert_array_equal(left.x, right.x)
            np.testing.assert_array_equal(left.y, right.y)


def test_a_run_shows_and_stores_the_check(clinics, tmp_path, capsys):
    run = tmp_path / "run"
    words = [
        "scenario=folder",
        f"scenario.path={clinics}",
        "scenario.target=sick",
        "scenario.ignore=[code]",
        "rounds=1",
    ]
    assert simulate([*words, "report=false", f"hydra.run.dir={run}"]) == 0
    shown = capsys.readouterr().out
    assert "data check 1 flag, see data_check.json or the report\n           - glucose: median" in shown
    check = view.read_data_check(run)
    assert [flag.kind for flag in check.flags] == ["units"]
    section = view.report_section(run)
    assert section["flags"][0]["advice"] == "'scenario.ignore=[code,glucose]'"


def test_an_error_of_the_check_does_not_end_a_run(clinics, monkeypatch, caplog):
    monkeypatch.setattr(run_check, "check_data", lambda *_, **__: 1 / 0)
    assert folder(path=clinics, target="sick", ignore=["code"]).data_check is None
    assert "the data check failed" in caplog.text


@pytest.fixture
def site(clinics, tmp_path):
    """Write the file of one node, with a level that occurs at this node only."""
    text = (clinics / "lyon.csv").read_text().replace("left", CANARY)
    (tmp_path / "lyon.csv").write_text(text)
    return tmp_path


def node_scenario(site):
    scales = {name: [50, 10] for name in ("age", "glucose", "weight", "code")}
    levels = {"side": [CANARY, "right"]}
    settings = {"scale": "constants", "scales": scales, "categories": levels, "classes": ["no", "yes"]}
    return folder(path=site, target="sick", clients=SITES, deployed=True, **settings)


def test_a_node_makes_no_check_for_a_run(site, monkeypatch):
    monkeypatch.setattr(run_check, "check_data", lambda *_, **__: pytest.fail("a node checked its data"))
    scenario = node_scenario(site)
    assert scenario.data_check is None
    assert CANARY not in repr(replace(scenario, preprocessing=None, network=None))


def test_no_module_of_a_deployment_knows_the_data_check():
    root = Path(fedlearn.__file__).parent
    modules = [file for name in ("deploy", "protocol", "engines") for file in (root / name).rglob("*.py")]
    assert len(modules) > 30
    assert [file.name for file in modules if "data_check" in file.read_text(encoding="utf-8")] == []


def test_names_from_data_send_no_commands_to_a_terminal(tmp_path, capsys):
    hostile = "a\x1b[2Jb"
    cells = ["north\x1b]0;x\x07", "south"]
    lines = [f"{hostile},site,y", *(f"1,{cells[number % 2]},{number % 3}" for number in range(40))]
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    assert command.main(["inspect", str(tmp_path / "d.csv"), "target=y", "client=site"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    inspection = inspect_path(str(tmp_path / "d.csv"), TableSettings(target="y", client="site"))
    assert inspection.check.flags
    assert "\x1b" not in view.header_text(inspection.check)
