import io
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from fedlearn.callbacks.console import Console, row_interval
from fedlearn.callbacks.formatting import human_bytes
from fedlearn.callbacks.run_history import history_entry
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.summary import summarise
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import Failure, Predictions, Round, ServerState

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def about(folder, **changes):
    facts = {
        "scenario": "heart", "task": "binary", "source": "UCI heart disease", "num_clients": 2,
        "examples_per_client": (123, 303),
        "client_names": {0: "Basel", 1: "Bern"}, "model": "mlp 13-32-1", "num_parameters": 481, "strategy": "fedprox",
        "strategy_settings": "mu 0.1", "cohort": "all 2 of 2 clients per round",
        "engine": "vector", "machine": "torch · cpu",
        "framework": "torch", "seed": 1, "rounds": 5, "rerun_command": "python -m simulations.run strategy=fedprox",
    }  # fmt: skip
    return RunInfo(folder=folder, **(facts | changes))


def a_round(number, *, evaluated=True, failures=()):
    part = Predictions(client=0, outputs=np.array([[1.0], [1.0], [-1.0], [1.0]]), targets=np.array([1, 0, 0, 1]))
    return Round(
        state=ServerState(round=number, seed=1, params_D=np.zeros(2, np.float32)),
        cohort=(0, 1),
        failures=failures,
        evaluation=evaluate([part], task="binary") if evaluated else None,
        bytes_up=1024,
        bytes_down=2048,
        seconds=0.5,
    )


def test_the_clock_is_told_where_there_is_one(tmp_path):
    lines = shown(about(tmp_path, system="lognormal · sigma 1"), [replace(a_round(1), clock=600.0)])
    assert re.search(r"system +lognormal · sigma 1", lines)
    assert "clock 10.0 min" in lines
    assert "10.0 min on the clock" in lines
    drawn = shown(about(tmp_path, system="lognormal"), [replace(a_round(1), clock=600.0)], terminal=True)
    assert re.search(r"ε +clock", drawn)
    assert "10.0 min" in drawn
    assert "on the clock" not in shown(about(tmp_path), [a_round(1)], terminal=True)


def broken(client):
    return Failure(
        client=client, stage="fit", reason="ValueError('[bold]')", traceback=f"Traceback\n  line of {client}\n"
    )


def shown(run, rounds, **options):
    file = io.StringIO()
    console = Console(file, **({"terminal": False, "width": 80} | options))
    console.on_start(run)
    for item in rounds:
        console.on_round(item)
    console.on_end(summarise(run, [history_entry(item) for item in rounds], status="done"))
    console.close()
    return file.getvalue()


def rows(text):
    return [
        int(found)
        for found in re.findall(r"^ +(\d+) +\S+ .* KiB", CONTROL.sub("", text).replace("\r", "\n"), re.MULTILINE)
    ]


def test_a_pipe_gets_one_plain_line_a_round_without_control_codes_or_boxes(tmp_path):
    text = shown(about(tmp_path), [a_round(r) for r in range(1, 6)])
    assert len(re.findall(r"^round \d/5  loss \S+  accuracy 75.0 %  worst 10 % 75.0 %  clients 2/2", text, re.M)) == 5
    assert not CONTROL.search(text)
    assert not set(text) & set("╭│╰━")


def test_what_was_sent_adds_up_both_ways_and_goes_on_after_a_resume(tmp_path):
    earlier = [history_entry(a_round(1)), history_entry(a_round(2))]
    text = shown(about(tmp_path, start_round=2, history=earlier), [a_round(3), a_round(4)])
    assert re.findall(r"sent (.*?)  time", text) == ["9.0 KiB", "12 KiB"]
    assert "after round 2 of 5" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_the_header_and_the_end_say_what_ran_and_how_to_repeat_it(tmp_path, terminal):
    (tmp_path / "report.html").touch()
    text = shown(about(tmp_path), [a_round(r) for r in range(1, 6)], terminal=terminal, width=100)
    for words in ("heart · 2 clients · 123-303 examples · UCI heart disease", "mlp 13-32-1 · 481 parameters · 1.9 KiB",
                  "fedprox · mu 0.1", "seed 1", "accuracy 75.0 %", "best 75.0 % at round 1",
                  "python -m simulations.run strategy=fedprox", "report.html"):  # fmt: skip
        assert words in text


def test_a_path_of_any_length_stays_on_one_line_so_that_it_can_be_copied(tmp_path):
    folder = tmp_path / ("long" * 30)
    assert str(folder) in shown(about(folder), [a_round(1)], terminal=True)


@pytest.mark.parametrize("width", [80, 100])
def test_no_row_of_header_or_table_is_wider_than_the_terminal(tmp_path, width):
    text = shown(about(tmp_path, framework="jax"), [a_round(r) for r in range(1, 6)], terminal=True, width=width)
    table = CONTROL.sub("", text).split(" done ")[0].replace("\r", "\n").splitlines()
    assert max(len(line) for line in table) <= width
    assert "compiled" in text
    assert text.count("compiled") == 1


def test_a_short_run_shows_every_round_and_a_long_one_about_twenty_and_the_last(tmp_path):
    short = shown(about(tmp_path, rounds=20), [a_round(r) for r in range(1, 21)], terminal=True)
    assert rows(short) == list(range(1, 21))
    long = shown(about(tmp_path, rounds=93), [a_round(r) for r in range(1, 94)], terminal=True)
    assert rows(long) == [1, *range(5, 93, 5), 93]


def test_rows_wait_for_the_rounds_that_are_evaluated(tmp_path):
    run = about(tmp_path, rounds=60)
    text = shown(run, [a_round(r, evaluated=r % 4 == 0) for r in range(1, 61)], terminal=True)
    assert all(number % 4 == 0 for number in rows(text))
    assert rows(text)[-1] == 60


def test_a_run_that_stops_early_shows_its_last_round(tmp_path):
    text = shown(about(tmp_path, rounds=100), [a_round(r) for r in range(1, 14)], terminal=True)
    assert rows(text) == [1, 5, 10, 13]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_first_failure_shows_its_traceback_and_later_ones_are_counted(tmp_path, terminal):
    rounds = [a_round(1), a_round(2, failures=(broken(1),)), a_round(3, failures=(broken(0), broken(1)))]
    text = CONTROL.sub("", shown(about(tmp_path), rounds, terminal=terminal, width=100))
    assert text.count("Traceback") == 1
    assert "round 2: Bern (client 1) failed in fit: ValueError('[bold]')" in text
    assert "round 3: Basel (client 0) failed in fit: ValueError('[bold]') (and 1 more)" in text
    assert "3 of 6 client updates" in text


def test_characters_that_the_stream_cannot_hold_do_not_stop_a_run(tmp_path):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(file, terminal=False)
    console.on_start(about(tmp_path))
    console.on_round(a_round(1))
    file.flush()
    assert b"heart ? 2 clients" in raw.getvalue()


def test_closing_twice_and_without_an_end_is_harmless(tmp_path):
    console = Console(io.StringIO(), terminal=True)
    console.on_start(about(tmp_path))
    console.close()
    console.close()


def test_steps_between_rows_are_round_numbers():
    assert {row_interval(rounds) for rounds in range(1, 20_000)} == {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000}


def test_sizes_never_take_more_than_three_digits_and_a_unit():
    assert all(len(human_bytes(2**k - 1)) <= 8 for k in range(45))


def test_text_that_another_callback_prints_does_not_break_the_progress_line(tmp_path):
    file = io.StringIO()
    console = Console(file, terminal=True, width=80)
    console.on_start(about(tmp_path))
    print("a message of a callback")  # noqa: T201
    sys.stderr.write("a warning of a callback\n")
    console.on_round(a_round(1))
    console.close()
    assert sys.stdout is not file
    text = CONTROL.sub("", file.getvalue())
    for message in ("a message of a callback", "a warning of a callback"):
        assert re.search(rf"(^|[\n\r]){message} *\n", text)
    console.close()
