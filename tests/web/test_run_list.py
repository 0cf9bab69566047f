"""The list of runs follows the files of run folders, and survives any contents."""

import json
import os

import pytest
from filelock import FileLock
from run_folders import HOSTILE, RunFolder, line

from fedlearn.web import run_list, safe_files
from fedlearn.web.run_list import RunList


def only(runs):
    (view,) = runs.update()
    return view


def test_a_run_is_followed_from_its_start_to_its_end(tmp_path):
    folder, runs = RunFolder(tmp_path / "digits" / "first"), RunList(tmp_path)
    with FileLock(folder.path / ".lock"):
        view = only(runs)
        assert (view.key, view.state, view.round, view.rounds, view.value) == ("digits/first", "starting", 0, 10, None)
        folder.add(line(1, value=0.25), line(2, value=0.5, reason="gone"))
        view = only(runs)
        assert (view.state, view.round, view.value, view.metric, view.is_share) == ("running", 2, 0.5, "Accuracy", True)
        assert (view.trend, view.num_failures, view.seconds) == ([0.25, 0.5], 1, 0.5)
        assert (view.scenario, view.strategy) == ("digits", "fedavg")
        detail = runs.detail("digits/first")
        assert [failure.reason for failure in detail.failures] == ["gone"]
        folder.add(line(3, value=0.75)[:-9])  # a line that is being written
        assert only(runs).round == 2
        folder.add(line(3, value=0.75)[-9:])
        assert only(runs).round == 3
    assert only(runs).state == "interrupted"
    folder.end("early_stopped", reason="no progress")
    assert (only(runs).state, only(runs).reason) == ("early stopped", "no progress")
    assert runs.detail("digits/first").rounds == [1, 2, 3]


def test_a_resumed_run_is_running_again_and_its_file_is_read_from_the_start(tmp_path):
    folder, runs = RunFolder(tmp_path / "run").add(line(1), line(2), line(3)).end("stopped"), RunList(tmp_path)
    assert (only(runs).state, only(runs).round) == ("stopped", 3)
    with FileLock(folder.path / ".lock"):
        kept = folder.path / "kept"
        kept.write_text(line(1) + line(2, value=0.9))
        kept.replace(folder.path / "metrics.jsonl")
        assert (only(runs).state, only(runs).round, only(runs).value) == ("running", 2, 0.9)
        assert runs.detail("run").rounds == [1, 2]


def test_the_lock_of_a_run_is_not_touched(tmp_path, monkeypatch):
    folder, runs = RunFolder(tmp_path / "run").add(line(1)), RunList(tmp_path)
    lock = FileLock(folder.path / ".lock")
    monkeypatch.setattr("fcntl.flock", lambda *args: pytest.fail("an attempt to lock could stop a run that starts"))
    only(runs)
    monkeypatch.undo()
    with lock.acquire(timeout=0):
        assert only(runs).state == "running"


def test_only_the_newest_runs_are_listed_and_runs_in_progress_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(run_list, "MAX_RUNS", 3)
    for number in range(5):
        folder = RunFolder(tmp_path / f"run{number}").add(line(1)).end()
        for file in folder.path.iterdir():
            os.utime(file, (number, number))
    runs = RunList(tmp_path)
    assert [view.key for view in runs.update()] == ["run4", "run3", "run2"]
    assert runs.num_runs == 5
    with FileLock(tmp_path / "run2/.lock"):
        assert [view.key for view in runs.update()] == ["run2", "run4", "run3"]
    assert runs.detail("run0") is None


def test_nothing_outside_of_the_folder_is_read(tmp_path):
    secret = RunFolder(tmp_path / "outside").add(line(1, value=0.123)).end().path
    (secret / "report.html").write_text("secret")
    root = tmp_path / "root"
    inside = RunFolder(root / "run").add(line(1)).path
    (root / "link").symlink_to(secret)
    for name in ("report.html", "summary.json"):
        (inside / name).symlink_to(secret / name)
    trap = root / "trap"
    trap.mkdir()
    (trap / "metrics.jsonl").symlink_to(secret / "metrics.jsonl")
    runs = RunList(root)
    assert [view.key for view in runs.update()] == ["run"]
    assert only(runs).state == "interrupted"  # the summary outside does not count
    for key in ("run", "link", "../outside", "/" + str(secret), "run/../../outside", "", "."):
        assert runs.report(key) == b""


@pytest.mark.parametrize("kind", ["pipe", "folder", "large", "no rights"])
def test_a_file_that_is_no_plain_file_is_empty_and_stops_nothing(tmp_path, monkeypatch, kind):
    path = tmp_path / "summary.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text('{"a": 1}')
        monkeypatch.setattr(safe_files, "MAX_JSON_BYTES", 4)
    limits = {"max_bytes": 4} if kind == "large" else {}
    if kind == "no rights":
        monkeypatch.setattr(os, "open", lambda *args: (_ for _ in ()).throw(PermissionError()))
    assert safe_files.read_bytes(tmp_path, path, **limits) == b""


VALUES = [None, True, "text", HOSTILE, -1, 10**400, [], [[]], {}, {"a": None}, {HOSTILE: HOSTILE}, {"a": float("nan")}]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_any_json_in_any_place_gives_plain_finite_values(tmp_path, value):
    names = json.loads(line(1, lower_is_better=[]))
    lines = [line(2, **{name: value}) for name in names]
    RunFolder(tmp_path / "lines").add(line(1), *lines, line(3))
    for number, name in enumerate(("header", "metric", "rounds", "resumed", "epsilon_limit")):
        folder = RunFolder(tmp_path / f"environment{number}").add(line(1))
        (folder.path / "environment.json").write_text(json.dumps({name: value}))
    for number, name in enumerate(("status", "reason", "scenario", "metric", "rounds_planned", "privacy")):
        RunFolder(tmp_path / f"summary{number}").add(line(1)).end(
            **{name: value} if name != "status" else {"status": value}
        )
    runs = RunList(tmp_path)
    for view in runs.update():
        text = json.dumps([vars(view), runs.detail(view.key)], default=vars, allow_nan=False)
        assert len(text) < 20_000


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null\n", b"{}\n[]\n3\n", b"\0" * 5000, b"\n" * 9]
)
def test_damaged_files_are_shown_as_a_run_without_rounds(tmp_path, text):
    folder = RunFolder(tmp_path / "run")
    for name in ("metrics.jsonl", "summary.json", "environment.json"):
        (folder.path / name).write_bytes(text)
    assert only(RunList(tmp_path)).round == 0


def test_names_have_no_control_characters(tmp_path):
    RunFolder(tmp_path / "run", scenario="a\u202eb\x1b[31m\n\u200b").add(line(1))
    assert only(RunList(tmp_path)).scenario == "a b [31m"


def test_long_runs_have_a_limited_number_of_points_with_the_last_round(tmp_path):
    RunFolder(tmp_path / "run", rounds=1234).add(*(line(number, value=number / 2000) for number in range(1, 1235)))
    runs = RunList(tmp_path)
    view = only(runs)
    assert len(view.trend) <= 40
    assert view.trend[-1] == view.value == 1234 / 2000
    detail = runs.detail("run")
    assert len(detail.rounds) <= 500
    assert detail.rounds[-1] == 1234
    assert all(len(curve.values) == len(detail.rounds) for chart in detail.charts for curve in chart.curves)


def test_epsilon_has_a_chart_with_its_limit(tmp_path):
    folder = RunFolder(tmp_path / "run").add(line(1, epsilon=1.5), line(2, epsilon=2.5))
    environment = json.loads((folder.path / "environment.json").read_text())
    (folder.path / "environment.json").write_text(json.dumps(environment | {"epsilon_limit": 8.0}))
    runs = RunList(tmp_path)
    assert (only(runs).epsilon, only(runs).epsilon_limit) == (2.5, 8.0)
    (chart,) = [chart for chart in runs.detail("run").charts if chart.title == "Epsilon"]
    assert (chart.limit, list(chart.curves[0].values)) == (8.0, [1.5, 2.5])


def test_a_run_folder_itself_can_be_watched(tmp_path):
    RunFolder(tmp_path / "run").add(line(1))
    assert only(RunList(tmp_path / "run")).key == "."
