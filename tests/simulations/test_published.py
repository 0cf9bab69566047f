"""Published tables: declarations, gates, stored results, and reruns of quick rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from needs import needs

from fedlearn.errors import SettingError
from fedlearn.loop.rule_support import require_settings, require_steps
from fedlearn.runner.compose import CONF_DIR, compose
from fedlearn.runner.plan import build_plan
from fedlearn.runner.run_result import RunResult
from fedlearn.runner.start import parse_args
from simulations.published import TABLES, all_rows
from simulations.published.measures import best_accuracy, best_accuracy_by, first_crossing
from simulations.published.records import Published
from simulations.published.results_page import gate_of, result_file, results_page
from simulations.published.run_rows import run_rows
from simulations.published.stored_results import SeedResult, read_results, store_results

needs("torch", "sklearn")

DOCS = Path(__file__).parents[2] / "docs"
QUICK = {"flamby_heart/fedavg": 42, "flamby_heart/cyclic_alone": 42}  # row -> seed; about a second each
ONE_PATIENT = 100 / 254
TOLERANCES = {"flamby_heart": ONE_PATIENT + 1e-6}  # points between machines
MAX_SECONDS = 120  # rows of longer runs are compared by hand: simulations.results --run ROW --again


def stored(name: str) -> list[SeedResult]:
    table = TABLES[name.partition("/")[0]]
    row = all_rows()[name]
    return read_results(row, result_file(table, row, DOCS / "results"))


def first_rows() -> set[str]:
    """Return the first row of each recipe and strategy."""
    kinds = {}
    for name, row in all_rows().items():
        kinds.setdefault(tuple(word for word in row.settings if word.startswith(("experiment=", "strategy"))), name)
    return {*kinds.values()}


def composed(name: str):
    (job,) = compose(parse_args([*all_rows()[name].settings, "seed=1"]))
    return job.cfg


def seed_result(value: float | None, seed: int = 1) -> SeedResult:
    names = [measure.name for measure in all_rows()["flamby_heart/fedavg"].measures]
    values = dict.fromkeys(names, value)
    digest = "0" * 64
    return SeedResult(
        seed=seed, values=values, rounds=1, seconds=1, parameters_sha256=digest, data_sha256=digest, packages={}
    )


def test_the_page_is_written_from_the_stored_results():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert page == results_page(DOCS / "results"), "run python -m simulations.results"


def test_each_stored_file_belongs_to_a_row():
    files = {
        path.relative_to(DOCS / "results").with_suffix("").as_posix() for path in (DOCS / "results").rglob("*.json")
    }
    assert files <= all_rows().keys()
    assert [name for name in files if not stored(name)] == [], "settings or recipe of these rows have changed"


def test_each_stored_result_is_a_run_of_this_row():
    for name, row in all_rows().items():
        for result in stored(name):
            assert result.values.keys() == {measure.name for measure in row.measures}, name
            assert len(result.parameters_sha256) == len(result.data_sha256) == 64, name


@pytest.mark.parametrize(
    "name", [name if name in first_rows() else pytest.param(name, marks=pytest.mark.slow) for name in all_rows()]
)
def test_the_settings_of_a_row_are_complete_and_none_is_refused(name):
    cfg = composed(name)
    assert cfg.scenario._target_.startswith("simulations.scenarios.")
    assert cfg.rounds >= 4
    plan = build_plan(cfg)
    require_settings(plan.strategy.local, plan.local)
    require_steps(plan.strategy, plan.local)


def head_of(path: Path) -> str:
    """Return the comments of a recipe."""
    return path.read_text(encoding="utf-8").split("defaults:")[0]


PAPER = re.compile(r"arXiv:|FLamby|Opacus|LEAF|Published|et al\.| reports ")
PAPER_RECIPES = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml") if PAPER.search(head_of(path)))
ANOTHER = "Not the experiment of "


def recipes_of(rows) -> set[str]:
    """Return the names of the recipes of rows."""
    return {word.partition("=")[2] for row in rows for word in row.settings if word.startswith("experiment=")}


def is_another_experiment(recipe: str) -> bool:
    """Return whether the first line of a recipe says that it is not the experiment of a paper."""
    lines = head_of(CONF_DIR / "experiment" / f"{recipe}.yaml").splitlines()
    return lines[1].startswith(f"# {ANOTHER}")


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_a_recipe_that_cites_a_paper_is_in_a_table_or_says_that_it_is_another_experiment(name):
    assert name in recipes_of(all_rows().values()) or is_another_experiment(name)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_experiment_has_no_published_values_and_its_recipes_say_so(name):
    table = TABLES[name]
    if table.protocol.startswith(ANOTHER):
        assert not any(measure.published for row in table.rows for measure in row.measures)
        assert all(is_another_experiment(recipe) for recipe in recipes_of(table.rows))


def test_a_row_with_a_published_value_has_a_recipe_of_the_experiment():
    rows = [row for row in all_rows().values() if any(measure.published for measure in row.measures)]
    assert not [recipe for recipe in recipes_of(rows) if is_another_experiment(recipe)]


@pytest.mark.parametrize(
    ("deviation", "value", "expected"),
    [(None, 81.0, "pass"), (None, 81.01, "fail"), (0.2, 79.0, "pass"), (2.5, 82.5, "pass"), (2.5, 77.4, "fail")],
)
def test_the_gate_is_the_published_deviation_or_one_point(deviation, value, expected):
    measure = all_rows()["flamby_heart/fedavg"].measures[0]
    measure = replace(measure, published=Published(value=80.0, deviation=deviation, source="a table"))
    assert gate_of(measure, [seed_result(value - 1, 1), seed_result(value + 1, 2)]) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [((40, 87), "reached"), ((40, 88), "missed"), ((40, None), "missed"), ((None,), "missed")],
)
def test_each_seed_has_to_reach_a_target_by_the_published_round(values, expected):
    measure = all_rows()["flamby_heart/fedavg"].measures[0]
    measure = replace(measure, published=Published(value=87, source="a table", gate="limit"))
    assert gate_of(measure, [seed_result(value, seed) for seed, value in enumerate(values)]) == expected


def test_the_page_counts_the_seeds_that_reach_a_target(tmp_path):
    row = all_rows()["mcmahan_mnist/cnn_iid"]
    name = row.measures[0].name
    for values, cells in [
        ((None, None), "not reached | 2 of 3 | 18.00 | missed"),
        ((17.0, None), "17.00 (reached by 1) | 2 of 3 | 18.00 | missed"),
        ((17.0, 17.0), "17.00 ± 0.00 | 2 of 3 | 18.00 | reached"),
    ]:
        results = [replace(seed_result(0, seed), values={name: value}) for seed, value in enumerate(values, 1)]
        store_results(row, results, result_file(TABLES["mcmahan_mnist"], row, tmp_path))
        assert f"| CNN, IID | {name} | {cells} | " in results_page(tmp_path)


def test_only_rounds_to_a_target_have_a_limit_instead_of_the_gate():
    measures = [measure for row in all_rows().values() for measure in row.measures if measure.published]
    limits = {measure.name for measure in measures if measure.published.gate == "limit"}
    assert limits == {"rounds to 97 %", "rounds to 99 %"}
    assert {measure.name for measure in measures if measure.published.gate == "none"} == {"epsilon"}


def test_the_page_has_processor_seconds_and_says_where_they_are_wall_seconds(tmp_path):
    name = "flamby_heart/fedavg"
    row, file = all_rows()[name], result_file(TABLES["flamby_heart"], all_rows()[name], tmp_path)
    results = [seed_result(74, 42), seed_result(75, 43)]
    store_results(row, results, file)
    assert " | pass | 1 (wall) | 00000000 | " in results_page(tmp_path)
    store_results(row, [results[0], replace(results[1], processor_seconds=7.4)], file)
    assert " | pass | 7 | 00000000 | " in results_page(tmp_path)


def test_the_page_states_the_estimated_time_of_rows_that_are_not_run():
    page = results_page(Path("nowhere"))
    for row in all_rows().values():
        if row.hours:
            time = f"{row.hours:g} h" if row.hours >= 1 else f"{60 * row.hours:.0f} min"
            (line,) = [line for line in page.splitlines() if line.startswith(f"| {row.label} |")]
            assert f" | not run (about {time} a seed) | " in line


def test_a_row_that_is_not_run_states_its_time():
    assert [name for name, row in all_rows().items() if not stored(name) and row.hours is None] == []


def test_a_row_without_results_has_no_number():
    measure = all_rows()["flamby_heart/fedavg"].measures[0]
    assert gate_of(measure, []) == "not run"
    assert gate_of(replace(measure, published=None), [seed_result(80)]) == "none"
    epsilon = Published(value=80, source="a table", gate="none")
    assert gate_of(replace(measure, published=epsilon), [seed_result(80)]) == "none"
    page = results_page(Path("nowhere"))
    lines = [line for line in page.splitlines() if line.startswith("| FedAvg100 ")]
    assert lines == ["| FedAvg100 | accuracy, % | not run | – | 74.80 ± 2.68 | not run | – | – | – |"]


def test_results_of_other_settings_are_not_results_of_a_row(tmp_path):
    row, file = all_rows()["flamby_heart/fedavg"], tmp_path / "row.json"
    store_results(row, [seed_result(70, seed=43), seed_result(80, seed=42), seed_result(90, seed=7)], file)
    assert [result.seed for result in read_results(row, file)] == [42, 43]
    assert read_results(replace(row, settings=(*row.settings, "rounds=2")), file) == []
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"recipe_sha256": "0" * 64}))
    assert read_results(row, file) == []


def test_a_curve_reaches_its_target_between_two_evaluations():
    curve = [(10, 50.0), (20, 40.0), (30, 70.0), (40, 80.0)]
    assert first_crossing(curve, 60.0) == 25.0  # the best so far is 50 at round 20
    assert first_crossing(curve, 50.0) == 10.0
    assert first_crossing(curve, 81.0) is None


def test_the_best_accuracy_is_that_of_personal_models_if_there_are_any(tmp_path):
    lines = [
        {"round": 1, "test": {"accuracy": 0.9}, "personal": {"accuracy": {"pooled": 0.6}}},
        {"round": 2, "test": None},
        {"round": 3, "test": {"accuracy": 0.8}, "personal": {"accuracy": {"pooled": 0.7}}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunResult(folder=tmp_path)
    assert best_accuracy().read(run) == pytest.approx(70)
    assert best_accuracy_by(2).read(run) == pytest.approx(90)


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_row_runs_again_with_the_stored_value(name, tmp_path, monkeypatch):
    rerun(name, QUICK[name], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in all_rows() if name not in QUICK])
def test_a_row_runs_again_with_the_stored_value(name, tmp_path, monkeypatch):
    before = stored(name)
    if not before or before[0].seconds > MAX_SECONDS:
        pytest.skip("no stored result, or a long run")
    rerun(name, before[0].seed, tmp_path, monkeypatch)


def rerun(name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_rows([name], seeds=[seed], again=False, docs=tmp_path / "docs", runs=tmp_path / "runs") == 0
    table, row = TABLES[name.partition("/")[0]], all_rows()[name]
    (again,) = read_results(row, result_file(table, row, tmp_path / "docs/results"))
    (before,) = (result for result in stored(name) if result.seed == seed)
    assert again.data_sha256 == before.data_sha256
    for measure, value in before.values.items():
        assert again.values[measure] == pytest.approx(value, abs=TOLERANCES.get(table.name, 0.5))
    assert again.processor_seconds > 0
    assert not list((tmp_path / "runs").rglob("*.json")), "the run folder is deleted"


@pytest.mark.parametrize("names", [["flamby_heart/fedavgg"], ["nothing"]])
def test_an_unknown_row_is_refused(names, tmp_path):
    with pytest.raises(SettingError, match="a row or a table of"):
        run_rows(names, seeds=None, again=False, docs=tmp_path, runs=tmp_path)


def test_an_unknown_seed_is_refused(tmp_path):
    with pytest.raises(SettingError, match="seeds of the row fedavg"):
        run_rows(["flamby_heart/fedavg"], seeds=[1], again=False, docs=tmp_path, runs=tmp_path)
