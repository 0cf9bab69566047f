import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from judged import experiment, state_of
from needs import needs

from fedlearn.callbacks.formatting import human_seconds
from fedlearn.callbacks.run_files import RunFiles
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.summary import summarise
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import Failure, Predictions, Round, ServerState
from fedlearn.core.tasks import TASKS
from fedlearn.errors import DataError, MissingExtra
from fedlearn.runner.evaluation import evaluate_final_model

pytest.importorskip("jinja2", reason="needs the extra 'report'")
from fedlearn.callbacks import report, report_figures, report_question, report_tables
from fedlearn.callbacks.model_card import BLANK
from fedlearn.callbacks.run_results import read_run
from simulations.report import main

needs("matplotlib", reason="needs the extra 'report'")

HOSTILE = '<script>alert("x")</script>'


def leave_a_run(folder, task="binary", num_clients=4, num_rounds=3, finished=True, clock=False):
    columns = 3 if task == "multiclass" else 1
    about = RunInfo(
        scenario="heart", task=task, num_clients=num_clients, model="logistic", num_parameters=14,
        client_names={1: HOSTILE},
        strategy="fedavg", cohort="all", engine="serial", framework="numpy", seed=1, rounds=num_rounds, folder=folder,
        rerun_command="python -m simulations.run scenario=heart",
    )  # fmt: skip
    clients = [
        {"client": k, "name": about.name(k), "num_examples": 9, "counts": [k, 9 - k]} for k in range(num_clients)
    ]
    lie = {"kind": "targets" if task == "regression" else "labels", "num_clients": num_clients, "clients": clients}
    lie |= {"columns": [0.0, 1.0, 2.5] if task == "regression" else [0, 1]}
    files = RunFiles()
    files.on_start(replace(about, partition=lie))
    for number in range(1, num_rounds + 1):
        item = a_round(number, task, columns, num_clients)
        files.on_round(replace(item, clock=100.0 * number) if clock else item)
    if finished:
        files.on_end(summarise(about, files.history, status="done", parameters_sha256="00ff"))
    files.close()
    (folder / "config.yaml").write_text(f"strategy: fedavg # {HOSTILE}\n")
    return folder


def a_round(number, task, columns, num_clients):
    rng = np.random.default_rng(number)
    targets = rng.integers(0, max(2, columns), 9) if task != "regression" else rng.normal(size=9)
    parts = [Predictions(client=k, outputs=rng.normal(size=(9, columns)), targets=targets) for k in range(num_clients)]
    return Round(
        state=ServerState(round=number, seed=1, params_D=np.zeros(14, np.float32)),
        cohort=tuple(range(num_clients)),
        failures=(Failure(client=1, stage="fit", reason=HOSTILE),),
        evaluation=evaluate(parts, task=task),
        bytes_up=2048,
        seconds=0.1,
    )


@pytest.mark.parametrize(("task", "num_clients"), [("binary", 4), ("multiclass", 60), ("regression", 4)])
def test_the_report_is_one_file_that_asks_nothing_of_the_network(tmp_path, task, num_clients):
    page = report.write_report(leave_a_run(tmp_path, task, num_clients)).read_text()
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')>\s]+)', page)
    figures = {"convergence.png", "traffic.png", "fairness.png", "partition.png"}
    figures |= set() if task == "regression" else {"confusion.png"}
    assert len(sources) == len(figures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    assert "<script" not in page
    assert {path.name for path in (tmp_path / "figures").iterdir()} == figures


def test_the_report_holds_results_settings_failures_and_the_command(tmp_path):
    page = report.write_report(leave_a_run(tmp_path)).read_text()
    for section in (
        "Result",
        "Convergence",
        "Fairness over clients",
        "Partition",
        "Failures",
        "Settings",
        "Environment",
    ):
        assert f"<h2>{section}</h2>" in page
    assert "python -m simulations.run scenario=heart" in page
    assert "&lt;script&gt;" in page
    assert "00ff" in page
    assert page.count("<figcaption>") == 5


def leave_a_judged_run(folder, task="binary", **kwargs):
    """Leave the files of a run with a judged model, whose classes and clients have hostile names."""
    run = leave_a_run(folder, task)
    given = experiment(task, subgroups=("sex",), **kwargs)
    evaluation = evaluate_final_model(given, state_of(given))
    target = given.scenario.preprocessing.target
    rename(folder / "environment.json", target={"name": HOSTILE, "unit": target.unit, "classes": list(target.classes)})
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return run, evaluation


def rename(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_report_starts_with_question_result_sites_and_clinical_figures(tmp_path):
    _, evaluation = leave_a_judged_run(tmp_path)
    page = html.unescape(report.write_report(tmp_path).read_text())
    accuracy, sensitivity = evaluation["metrics"]["accuracy"], evaluation["clinical"]["sensitivity"]
    parts = [
        f"Predict {HOSTILE}: “yes” (positive class) or “no”.",
        f"{100 * accuracy['value']:.1f} %",
        f"95 % interval {100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f} %",
        "A model that always predicts “no” has",
        "Data set",
        "Sensitivity",
        f"{100 * sensitivity['value']:.1f} %",
        f"{sensitivity['part']} of {sensitivity['whole']} of class “yes” are found",
        "Held-out examples",
        "Privacy in plain words",
        "<h2>Result</h2>",
        "<h2>Thresholds</h2>",
        "<h2>Calibration</h2>",
        "<h2>Groups</h2>",
        "<h2>Importance of columns</h2>",
    ]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert page.count("data:image/png") == 7


@pytest.mark.parametrize("task", [pytest.param("multiclass", marks=pytest.mark.slow), "regression"])
def test_other_tasks_show_their_judgement(tmp_path, task):
    leave_a_judged_run(tmp_path, task)
    page = report.write_report(tmp_path).read_text()
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn >= ({"curves", "calibration", "confusion"} if task == "multiclass" else {"residuals"})
    assert ("Balanced accuracy" in page) == (task == "multiclass")
    assert "Sensitivity" not in page


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda run, folder: {})


def test_a_result_inside_the_interval_of_a_constant_is_named(tmp_path):
    leave_a_judged_run(tmp_path)
    verdicts = []
    for low, high in ((0.6, 0.9), (0.1, 0.4), (0.4, 0.9)):
        metrics = {"accuracy": {"value": (low + high) / 2, "low": low, "high": high}}
        constant = {"prediction": "no", "metrics": {"accuracy": 0.5}}
        rename(tmp_path / "evaluation.json", metrics=metrics, constant=constant)
        verdicts.append(report_question.main_result(read_run(tmp_path))["verdict"])
    assert [verdict.split(". ")[1].split(",")[0] for verdict in verdicts] == [
        "The whole interval is better.", "The whole interval is worse.", "The interval includes this value"
    ]  # fmt: skip


def test_a_missing_judgement_states_its_reason(tmp_path, no_figures):
    leave_a_run(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"format": 1, "missing": "outputs stay at the nodes"}))
    assert "are missing: outputs stay at the nodes" in report.write_report(tmp_path).read_text()
    (tmp_path / "evaluation.json").write_text(json.dumps({"format": 99}))
    assert "another version of fedlearn" in report.write_report(tmp_path).read_text()


def test_the_model_card_has_blanks_numbers_limits_and_no_markup_of_names(tmp_path, no_figures):
    _, evaluation = leave_a_judged_run(tmp_path)
    rename(tmp_path / "summary.json", warnings=["the model is of no use"])
    report.write_report(tmp_path)
    card = (tmp_path / "model_card.md").read_text()
    assert card.count(BLANK) == 5
    for heading in ("Use", "Data", "Model and training", "Results", "Limits", "Privacy", "Reproduction"):
        assert f"\n## {heading}\n" in card
    assert f"{100 * evaluation['metrics']['accuracy']['value']:.1f} %" in card
    assert "Negative predictive value" in card
    assert "Warning: the model is of no use." in card
    assert "python -m simulations.run scenario=heart" in card
    assert "<script" not in card
    assert "numpy" in card


def test_a_model_card_that_its_owner_changed_is_kept(tmp_path, no_figures):
    leave_a_run(tmp_path)
    report.write_report(tmp_path)
    card = tmp_path / "model_card.md"
    changed = card.read_text().replace(BLANK, "triage", 1)
    card.write_text(changed)
    report.write_report(tmp_path)
    assert card.read_text() == changed


def test_characters_without_a_font_are_named(tmp_path, monkeypatch, no_figures):
    leave_a_run(tmp_path)
    monkeypatch.setattr(report_figures, "choose_fonts", lambda text: (["DejaVu Sans"], "上海"))
    page = report.write_report(tmp_path).read_text()
    assert "no font of this machine has the characters 上海" in page
    assert "fonts-noto-cjk" in page


def test_a_run_on_a_clock_is_shown_over_its_time_too(tmp_path):
    run = read_run(leave_a_run(tmp_path, clock=True))
    page = report.write_report(tmp_path).read_text()
    assert "<h2>Time to accuracy</h2>" in page
    assert (tmp_path / "figures" / "time.png").exists()
    assert ("On the clock", "5.0 min") in report_tables.headline_rows(run)
    *_, last = report_tables.time_to_target_rows(run)
    best = run.summary["best"]["accuracy"]
    assert (last["share"], last["round"]) == ("100 %", str(best["round"]))
    assert last["clock"] == human_seconds(100.0 * best["round"])


def test_the_result_table_gives_every_metric_of_the_task(tmp_path):
    run = read_run(leave_a_run(tmp_path, "regression"))
    assert [row["metric"] for row in report_tables.metric_rows(run)] == ["Loss", "RMSE", "MAE", "R²"]
    assert run.main_metric == "rmse"
    rows = report_tables.metric_rows(read_run(leave_a_run(tmp_path / "b")))
    assert len(rows) == len(TASKS["binary"].metrics)


def test_failures_are_counted_by_client_and_stage(tmp_path):
    (row,) = report_tables.failure_rows(read_run(leave_a_run(tmp_path)))
    assert (row["name"], row["stage"], row["count"], row["first"]) == (HOSTILE, "fit", 3, 1)


def test_a_run_that_was_killed_has_a_report_too(tmp_path):
    page = report.write_report(leave_a_run(tmp_path, finished=False)).read_text()
    assert "unfinished" in page
    assert "<h2>Convergence</h2>" in page


def test_a_run_of_which_only_the_log_is_left_has_a_report_too(tmp_path):
    whole = leave_a_run(tmp_path / "whole")
    (tmp_path / "log").mkdir()
    shutil.copy(whole / "metrics.jsonl", tmp_path / "log")
    page = report.write_report(tmp_path / "log").read_text()
    assert "<h2>Partition</h2>" not in page


def test_undefined_values_leave_gaps_and_not_errors(tmp_path):
    leave_a_run(tmp_path)
    log = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines[1:]:
        line["test"] = dict.fromkeys(line["test"])
        line["clients"] = {metric: dict.fromkeys(spread) for metric, spread in line["clients"].items()}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "clients.csv").write_text("client,name,num_examples,loss,accuracy\n0,a,9,,\n")
    (tmp_path / "summary.json").unlink()
    page = report.write_report(tmp_path).read_text()
    assert "<h2>Fairness over clients</h2>" not in page


def test_a_run_without_any_evaluation_says_so(tmp_path):
    leave_a_run(tmp_path, num_rounds=0)
    assert "No round was evaluated" in report.write_report(tmp_path).read_text()


def test_a_folder_that_is_no_run_is_refused_with_exit_code_2(tmp_path, capsys):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        report.write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_missing_library_names_the_extra_that_brings_it(tmp_path, monkeypatch):
    leave_a_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"fedlearn\[report\]"):
        report.write_report(tmp_path)


def test_the_command_draws_the_report_again(tmp_path):
    leave_a_run(tmp_path)
    command = [sys.executable, "-m", "simulations.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "report.html")
