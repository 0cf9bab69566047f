import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlearn.callbacks.console import plain_line
from fedlearn.callbacks.formatting import summary_lines
from fedlearn.callbacks.run_files import RunFiles, clients_table, partition_summary
from fedlearn.callbacks.run_history import (
    best_metrics,
    final_metrics,
    history_entry,
    read_history,
    totals,
    truncate_history,
)
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.summary import summarise
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import Examples, Failure, Predictions, Round, ServerState

NAMES = {0: "Cleveland", 1: 'Long Beach, "VA"', 2: "Basel"}


def about(folder, **changes):
    facts = {
        "scenario": "heart", "task": "binary", "num_clients": 3, "model": "logistic", "num_parameters": 14,
        "client_names": NAMES, "strategy": "fedavg", "cohort": "all", "engine": "serial", "framework": "numpy",
        "seed": 1, "rounds": 6,
    }  # fmt: skip
    return RunInfo(folder=folder, **(facts | changes))


def a_round(number, *, evaluated=True, failed=()):
    rng = np.random.default_rng(number)
    parts = [
        Predictions(client=k, outputs=rng.normal(size=(8, 1)), targets=np.arange(8) % 2 if k else np.zeros(8, int))
        for k in range(3)
    ]
    return Round(
        state=ServerState(round=number, seed=1, params_D=np.zeros(14, np.float32)),
        cohort=(0, 1, 2),
        failures=tuple(Failure(client=k, stage="fit", reason="out of memory") for k in failed),
        metrics={"loss": math.nan if number == 1 else 0.5 / number},
        evaluation=evaluate(parts, task="binary") if evaluated else None,
        num_examples=24,
        bytes_up=56 * (3 - len(failed)),
        bytes_down=168,
        seconds=0.25,
    )


def go(folder, numbers, start_round=0):
    files, run = RunFiles(), about(folder, start_round=start_round)
    files.on_start(run)
    for number in numbers:
        files.on_round(a_round(number, evaluated=number % 2 == 0, failed=(1,) if number == 3 else ()))
    files.on_end(summarise(run, files.history, status="done", parameters_sha256="00ff"))
    files.close()
    return files


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not valid JSON")

    return json.loads(text, parse_constant=refuse)


def test_each_round_leaves_one_line_of_strict_json_as_soon_as_it_is_done(tmp_path):
    files = RunFiles()
    files.on_start(about(tmp_path / "run"))
    for number in (1, 2, 3):
        files.on_round(a_round(number, failed=(2,)))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == number
        line = strict_json(lines[-1])
        assert (line["round"], line["cohort"], line["num_updates"]) == (number, 3, 2)
    files.close()
    assert line["failures"] == [{"client": 2, "stage": "fit", "reason": "out of memory"}]
    assert (line["bytes_up"], line["bytes_down"], line["num_examples"], line["epsilon"]) == (112, 168, 24, None)
    assert set(line["clients"]["accuracy"]) == {"mean", "std", "worst10"}


def test_nan_is_null_and_a_round_without_evaluation_says_so():
    line = history_entry(a_round(1, evaluated=False))
    assert line["train"] == {"loss": None}
    assert line["test"] is None
    assert line["clients"] is None


def test_clients_csv_holds_the_last_evaluation_with_undefined_values_empty(tmp_path):
    go(tmp_path, [1, 2, 3, 4, 5])
    with (tmp_path / "clients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = a_round(4).evaluation
    assert [row["name"] for row in rows] == list(NAMES.values())
    assert rows[0]["auc"] == ""
    assert [float(row["loss"]) for row in rows] == expected.per_client["loss"].tolist()


def test_personal_models_stand_beside_the_global_one(tmp_path):
    item = a_round(1)
    better = replace(item.evaluation, pooled={**item.evaluation.pooled, "loss": 0.125})
    item = replace(item, evaluation=replace(item.evaluation, personal=better))
    line = history_entry(item)
    assert line["test"]["loss"] == item.evaluation.pooled["loss"]
    assert line["personal"]["loss"] == {"pooled": 0.125, **line["clients"]["loss"]}
    table = list(csv.DictReader(io.StringIO(clients_table(item.evaluation, about(tmp_path)))))
    assert [row["personal_loss"] for row in table] == [row["loss"] for row in table]
    assert "personal" in plain_line(item, about(tmp_path), 0)
    shown = summarise(about(tmp_path), [line], status="done")
    assert shown["personal"]["loss"] == 0.125
    assert "personal models" in dict(summary_lines(shown))["done"]
    assert "personal" not in history_entry(a_round(1))


def test_the_summary_says_how_it_ended_and_what_it_took(tmp_path):
    go(tmp_path, range(1, 7))
    summary = strict_json((tmp_path / "summary.json").read_text())
    measured = {number: a_round(number).evaluation.pooled for number in (2, 4, 6)}
    assert summary["final"] == measured[6]
    at = min(measured, key=lambda number: measured[number]["loss"])
    assert summary["best"]["loss"] == {"value": measured[at]["loss"], "round": at}
    assert (summary["status"], summary["rounds"], summary["client_updates"]) == ("done", 6, 17)
    assert (summary["bytes_up"], summary["bytes_down"], summary["seconds"]) == (17 * 56, 6 * 168, 1.5)
    assert summary["parameters_sha256"] == "00ff"


@pytest.mark.parametrize("checkpoint", [0, 1, 3, 5, 6])
def test_a_run_killed_after_any_round_sums_up_as_an_uninterrupted_one(tmp_path, checkpoint):
    go(tmp_path / "whole", range(1, 7))
    go(tmp_path / "killed", range(1, 7))
    log = tmp_path / "killed" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"round": 7, "time": "20')
    go(tmp_path / "killed", range(checkpoint + 1, 7), start_round=checkpoint)
    item, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert item == other
    assert [line["round"] for line in read_history(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]


def test_resuming_leaves_earlier_lines_as_they_were(tmp_path):
    go(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    kept = truncate_history(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:2]
    assert [line["round"] for line in kept] == [1, 2]


def test_a_resumed_run_notes_its_new_environment_below_the_first(tmp_path):
    go(tmp_path, [1, 2])
    go(tmp_path, [3], start_round=2)
    shown = json.loads((tmp_path / "environment.json").read_text())
    assert shown["start_round"] == 0
    assert [item["start_round"] for item in shown["resumed"]] == [2]
    assert shown["packages"]["numpy"] == np.__version__


def test_no_draft_is_left_in_the_folder(tmp_path):
    go(tmp_path, range(1, 4))
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl", "clients.csv", "summary.json", "environment.json"
    }  # fmt: skip


def test_nothing_measured_gives_empty_totals_and_a_folder_without_a_log_an_empty_history(tmp_path):
    assert read_history(tmp_path) == []
    assert truncate_history(tmp_path, 3) == []
    assert totals([])["bytes_up"] == 0
    assert final_metrics([]) == best_metrics([]) == {}


def test_best_is_the_first_round_that_reached_it_and_skips_what_is_undefined():
    values = [None, 0.5, 0.75, 0.75, 0.25]
    lines = [{"round": r, "test": {"accuracy": v, "auc": None}} for r, v in enumerate(values, start=1)]
    assert best_metrics(lines) == {"accuracy": {"value": 0.75, "round": 3}}


def test_files_ask_to_be_started_first(tmp_path):
    with pytest.raises(RuntimeError, match="start"):
        RunFiles().on_round(a_round(1))


def data(task, targets, num_classes=2):
    def train(client):
        return Examples(np.zeros((len(targets[client]), 1), np.float32), np.asarray(targets[client]))

    return FederatedData(
        task=task, clients=range(len(targets)), train=train, test=train, num_classes=num_classes, names={0: "Basel"}
    )


def test_the_partition_counts_labels_by_client(tmp_path):
    shown = partition_summary(data("multiclass", [[0, 2, 2], []], num_classes=3))
    assert shown["columns"] == ["0", "1", "2"]
    named = partition_summary(data("binary", [[0, 1]]), ("no", "yes"))
    assert named["columns"] == ["no", "yes"]
    assert [row["counts"] for row in shown["clients"]] == [[1, 0, 2], [0, 0, 0]]
    assert [row["name"] for row in shown["clients"]] == ["Basel", "1"]
    files = RunFiles()
    files.on_start(replace(about(Path(tmp_path)), partition=shown))
    files.close()
    assert json.loads((tmp_path / "partition.json").read_text()) == shown


def test_the_partition_of_targets_puts_every_example_in_one_bin():
    shown = partition_summary(data("regression", [np.float32([1, 2, 3]), np.float32([3, 9])]))
    assert len(shown["columns"]) == len(shown["clients"][0]["counts"]) + 1
    assert [sum(row["counts"]) for row in shown["clients"]] == [3, 2]


def test_the_partition_of_a_large_population_shows_a_hundred_clients():
    shown = partition_summary(data("binary", [[0, 1]] * 150))
    assert len(shown["clients"]) == 100
    assert shown["num_clients"] == 150
