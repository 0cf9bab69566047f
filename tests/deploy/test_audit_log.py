"""The audit log shows each change, each missing line, and a missing end; no value of another party harms it."""

import json
import os
import stat
from multiprocessing import get_context

import numpy as np
import pytest

from fedlearn.deploy.audit_log import AUDIT_FILE, HEAD_FILE, AuditLog, read_events, verify


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "state")
    for number in range(6):
        log.append("run.ended", run=f"r{number}", epsilon=0.5 * number, sent={"delta": 900})
    return log


def problems(log, **options):
    return verify(log.path.parent, **options).problems


def test_an_intact_log_has_no_problem(log):
    head = log.append("run.started", run="x")
    assert head.count == 7
    assert problems(log) == ()
    assert problems(log, noted_head=str(head)) == ()
    assert [line["n"] for line in read_events(log.path.parent)] == [1, 2, 3, 4, 5, 6, 7]
    assert stat.S_IMODE(log.path.stat().st_mode) == stat.S_IMODE(log.head_path.stat().st_mode) == 0o600


def rewrite(log, change):
    lines = log.path.read_text().splitlines()
    lines = change(lines)
    log.path.write_text("".join(f"{line}\n" for line in lines))


CHANGES = {
    "a value": lambda lines: [line.replace('"r2"', '"r9"') for line in lines],
    "a space": lambda lines: [*lines[:2], lines[2].replace(":", ": ", 1), *lines[3:]],
    "a time": lambda lines: [*lines[:-1], lines[-1].replace('"time":"2', '"time":"1')],
    "the first line is missing": lambda lines: lines[1:],
    "a line is missing": lambda lines: lines[:2] + lines[3:],
    "two lines are swapped": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
    "a line is there twice": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "the end is missing": lambda lines: lines[:-1],
    "all lines are missing": lambda lines: [],
    "a line is added in the middle": lambda lines: [*lines[:2], json.dumps({"n": 3, "event": "x"}), *lines[2:]],
    "a line is not JSON": lambda lines: [*lines[:2], "{", *lines[3:]],
    "deeply nested": lambda lines: [*lines[:2], "[" * 100_000, *lines[3:]],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_also_after_further_events(log, name):
    rewrite(log, CHANGES[name])
    assert problems(log)
    log.append("run.started", run="later")
    assert problems(log)


def test_each_changed_byte_is_found(log):
    data = log.path.read_bytes()
    for position in range(0, len(data), 29):
        changed = bytearray(data)
        changed[position] ^= 1
        log.path.write_bytes(bytes(changed))
        assert problems(log), position
    log.path.write_bytes(data)
    assert problems(log) == ()


def test_a_log_written_again_with_its_head_is_found_by_a_noted_head_only(log, tmp_path):
    noted = str(log.read_head())
    forged = AuditLog(tmp_path / "forged")
    for number in range(9):
        forged.append("run.ended", run=f"other{number}")
    for name in (AUDIT_FILE, HEAD_FILE):
        os.replace(forged.path.with_name(name), log.path.with_name(name))
    assert problems(log) == ()  # the docstring of the module says so
    assert problems(log, noted_head=noted)


def test_a_missing_head_is_a_problem(log):
    log.head_path.unlink()
    assert "cannot be found" in problems(log)[0]


@pytest.mark.parametrize("torn", [b"{", b'{"n":7,"event"', b"\x00" * 50])
def test_a_line_that_a_crash_has_torn_is_repaired(log, torn):
    with log.path.open("ab") as file:
        file.write(torn)
    log.append("run.started", run="x")
    assert problems(log) == ()
    assert [line["event"] for line in read_events(log.path.parent)][-2:] == ["log.repaired", "run.started"]


def test_a_crash_between_log_and_head_is_no_problem(log):
    head = log.head_path.read_text()
    log.append("run.started", run="x")
    log.head_path.write_text(head)
    assert problems(log) == ()
    log.append("run.started", run="y")
    assert problems(log) == ()


def test_no_value_controls_a_terminal_or_fills_the_disk(log):
    before = log.path.stat().st_size
    log.append("x\x1b[2J\n", text="a\x1b]0;title\x07\n{\u202e" * 10**5, deep=deep(500), many=[*range(10**5)])
    log.append("x", **{"na\x1bme": {"k\n" * 10**5: "v"}}, number=10**500, nan=float("nan"), infinite=float("-inf"))
    log.append("x", values={f"key{i}": ["y" * 200] * 100 for i in range(100)}, run="kept")
    raw = log.path.read_bytes()[before:]
    assert len(raw) < 3 * 16384
    assert raw.count(b"\n") == 3
    assert not [
        c for line in read_events(log.path.parent) for c in json.dumps(line, ensure_ascii=False) if not c.isprintable()
    ]
    last = read_events(log.path.parent)[-1]
    assert last["run"] == "kept"
    assert len(last["omitted_sha256"]) == 64
    assert problems(log) == ()


def deep(depth):
    value = "end"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [np.zeros(3), np.float32(1), b"rows", {1, 2}, object()])
def test_an_array_or_bytes_never_enter(log, value):
    for given in (value, [value], {"x": value}):
        with pytest.raises(TypeError, match="a log line cannot have a value of type"):
            log.append("x", given=given)
    assert len(read_events(log.path.parent)) == 6


@pytest.mark.parametrize("name", ["n", "time", "prev", "hash"])
def test_no_field_replaces_a_part_of_the_chain(log, name):
    with pytest.raises(TypeError):
        log.append("x", **{name: "forged"})


def write_many(folder):
    for number in range(20):
        AuditLog(folder).append("x", number=number)


@pytest.mark.slow
@pytest.mark.process
def test_several_processes_write_one_chain(tmp_path):
    context = get_context("spawn")
    processes = [context.Process(target=write_many, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert len(read_events(tmp_path)) == 60
    assert verify(tmp_path).problems == ()
