"""Runs are distinguished by their settings, and compared over seeds."""

import json

import numpy as np
import pytest
from needs import needs

from fedlearn.callbacks.tables import markdown_table
from fedlearn.errors import DataError
from simulations.analysis.comparison import column_headings, comparison_rows, read_curves, table_rows
from simulations.compare import main

needs("matplotlib", reason="needs the extra 'report'")


def write_run(folder, values, *, seed, strategy="fedavg", task="accuracy", clock=None, **settings):
    """Write a run folder with these values of a metric, and a thousand bytes per round in each direction."""
    folder.mkdir(parents=True)
    current = "\n".join(f"  {key}: {value}" for key, value in settings.items())
    text = f"seed: {seed}\nrounds: {len(values)}\nrun_name: x{seed}\nscenario:\n  seed: {seed}\n"
    (folder / "config.yaml").write_text(f"{text}strategy:\n  _target_: strategies.{strategy}\n{current}\n")
    rows = []
    for number, value in enumerate(values, 1):
        test = None if value is None else {"loss": 1.0, task: value}
        sums = {"seconds": 0.1, "num_updates": 1, "failures": [], "bytes_up": 1000, "bytes_down": 1000}
        sums |= {} if clock is None else {"clock": clock * number}
        rows.append(json.dumps({"round": number, "test": test, "clients": None, **sums}))
    (folder / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))


def by(rows, column):
    return {row["setting"]: row[column] for row in rows}


def test_runs_that_differ_in_the_seed_alone_belong_together(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a{seed}", [0.5, 0.6 + seed / 10], seed=seed)
        write_run(tmp_path / f"b{seed}", [0.5, 0.7 + seed / 10], seed=seed, strategy="fedprox", mu=0.1)
    found, metric = read_curves([tmp_path])
    assert metric == "accuracy"
    assert {label: [item.seed for item in runs] for label, runs in found.items()} == {
        "fedavg": [1, 2, 3],
        "fedprox": [1, 2, 3],
    }
    rows = comparison_rows(found, metric)
    assert by(rows, "final") == {"fedavg": "80.0 ± 10.0 %", "fedprox": "90.0 ± 10.0 %"}
    assert by(rows, "difference") == {"fedavg": "–", "fedprox": "+10.0 ± 0.0 %"}  # the difference is taken per seed


def test_a_setting_is_named_where_it_differs_between_runs_of_its_builder(tmp_path):
    write_run(tmp_path / "a", [0.5], seed=1)
    write_run(tmp_path / "b", [0.5], seed=1, strategy="fedprox", mu=0.1)
    write_run(tmp_path / "c", [0.5], seed=1, strategy="fedprox", mu=0.5)
    assert [*read_curves([tmp_path])[0]] == ["fedavg", "fedprox · mu 0.1", "fedprox · mu 0.5"]


def test_rounds_and_bytes_to_a_target_are_those_of_the_first_evaluation_beyond_it(tmp_path):
    write_run(tmp_path / "a1", [0.1, None, 0.8, 0.2, 0.9], seed=1)
    write_run(tmp_path / "a2", [0.1, 0.2, 0.3, 0.3, 0.3], seed=2)
    write_run(tmp_path / "b1", [0.1] * 5, seed=1, strategy="fedprox")
    rows = comparison_rows(*read_curves([tmp_path]), target=0.8)
    assert by(rows, "rounds") == {"fedavg": "3 (1 of 2 runs)", "fedprox": "never"}
    assert by(rows, "bytes") == {"fedavg": "5.9 KiB", "fedprox": "–"}


def test_the_time_to_a_target_is_told_where_there_is_a_clock(tmp_path):
    write_run(tmp_path / "a1", [0.1, 0.8, 0.8], seed=1, clock=60.0)
    write_run(tmp_path / "a2", [0.1, 0.1, 0.9], seed=2, clock=60.0)
    write_run(tmp_path / "b1", [0.9, 0.9, 0.9], seed=1, strategy="fedprox")
    rows = comparison_rows(*read_curves([tmp_path]), target=0.8)
    assert by(rows, "clock") == {"fedavg": "2.5 min", "fedprox": "–"}
    assert column_headings("accuracy", 0.8, has_clock=True)["clock"] == "on the clock"
    assert "clock" not in column_headings("accuracy", 0.8)


def test_errors_are_better_when_they_are_small(tmp_path):
    write_run(tmp_path / "a", [3.0, 1.0, 2.0], seed=1, task="rmse")
    (row,) = comparison_rows(*read_curves([tmp_path]), target=1.5)
    assert (row["best"], row["final"], row["rounds"]) == ("1.0000", "2.0000", "2")


def test_seeds_that_one_setting_lacks_are_no_pairs(tmp_path):
    write_run(tmp_path / "a", [0.5], seed=1)
    write_run(tmp_path / "b", [0.9], seed=2, strategy="fedprox")
    assert by(comparison_rows(*read_curves([tmp_path])), "difference")["fedprox"] == "no seed in common"


def test_runs_of_different_scenarios_are_refused_with_a_command_that_works(tmp_path, capsys):
    for name in ("heart", "mnist"):
        write_run(tmp_path / name / "run", [0.5], seed=1)
        config = tmp_path / name / "run/config.yaml"
        config.write_text(
            config.read_text().replace("scenario:", f"scenario:\n  _target_: simulations.scenarios.{name}")
        )
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "heart in" in error
    assert "mnist in" in error
    advice = error.partition("try       python -m simulations.compare ")[2].split()
    assert main(advice) == 0


def test_data_and_question_of_a_folder_are_a_scenario_too(tmp_path):
    for name, target in (("a", "age"), ("b", "sex")):
        write_run(tmp_path / name, [0.5], seed=1)
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace("scenario:", f"scenario:\n  target: {target}"))
    with pytest.raises(DataError, match="different scenarios or data"):
        read_curves([tmp_path])


def test_a_repeated_seed_counts_once_and_the_longest_run_stays(tmp_path, capsys):
    write_run(tmp_path / "a", [0.5, 0.6], seed=1)
    write_run(tmp_path / "b", [0.5, 0.6], seed=1)
    write_run(tmp_path / "c", [0.5, 0.9], seed=2)
    assert by(comparison_rows(*read_curves([tmp_path])), "runs") == {"all runs": "2"}
    assert f"{tmp_path / 'a'} has the settings and the seed of {tmp_path / 'b'}" in capsys.readouterr().err
    (tmp_path / "b/metrics.jsonl").write_text((tmp_path / "b/metrics.jsonl").read_text().splitlines()[0] + "\n")
    runs = read_curves([tmp_path])[0]["all runs"]
    assert [len(run.rounds) for run in runs] == [2, 2]


def test_different_numbers_of_rounds_are_shown(tmp_path, capsys):
    write_run(tmp_path / "a", [0.5, 0.6], seed=1)
    write_run(tmp_path / "b", [0.5, 0.6, 0.7], seed=1, strategy="fedprox")
    assert main([str(tmp_path)]) == 0
    assert "last round" in capsys.readouterr().out
    assert sorted(by(comparison_rows(*read_curves([tmp_path])), "last_round").values()) == ["2", "3"]


def test_the_command_leaves_a_table_a_figure_and_facts(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", [0.5, 0.75], seed=seed)
    assert main([str(tmp_path), "--target", "0.7"]) == 0
    assert "75.0 ± 0.0 %" in capsys.readouterr().out
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][0]["rounds"] == "2"
    rows = comparison_rows(*read_curves([tmp_path]), target=0.7)
    assert (tmp_path / "compare.md").read_text() == markdown_table(table_rows(rows, column_headings("accuracy", 0.7)))


@pytest.mark.parametrize(
    ("metric", "reason"), [(None, "has no evaluated run"), ("auc", "not all runs have the metric auc")]
)
def test_what_cannot_be_compared_is_told(tmp_path, capsys, metric, reason):
    if metric:
        write_run(tmp_path / "a", [0.5], seed=1)
    words = [str(tmp_path), *(["--metric", metric] if metric else [])]
    assert main(words) == 2
    assert reason in capsys.readouterr().err
    with pytest.raises(DataError):
        read_curves([tmp_path], metric)


def test_an_undefined_value_is_left_out_of_means(tmp_path):
    write_run(tmp_path / "a1", [0.5, float("nan")], seed=1)
    write_run(tmp_path / "a2", [0.5, 0.5], seed=2)
    assert by(comparison_rows(*read_curves([tmp_path])), "final") == {"all runs": "50.0 %"}
    assert np.isnan(read_curves([tmp_path])[0]["all runs"][0].values[-1])
