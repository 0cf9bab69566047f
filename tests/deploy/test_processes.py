from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlearn.deploy.processes import MAX_RESTARTS, Child, ChildError, Children

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
    "time.sleep(600)",
]


def ends_in_time(pid, seconds=120.0):
    """Return whether a process ends in time; a zombie counts as ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_block_leaves_no_process_behind_not_even_a_stubborn_one_with_children(tmp_path):
    with Children(grace_s=0.5) as children:
        child = children.start(Child("stubborn", STUBBORN, tmp_path / "log"))
        children.wait_for(lambda: child.read_output().strip().isdigit(), "it is up", timeout_s=120)
        grandchild = int(child.read_output())
    assert ends_in_time(child.process.pid)
    assert ends_in_time(grandchild)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals child processes that their parent has ended")
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fedlearn.deploy.processes import Child, Children\n"
        f"with Children() as children:\n    child = Child('c', {SLEEP!r}, Path({str(tmp_path / 'log')!r}))\n"
        "    print(children.start(child).process.pid, flush=True)\n    time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.communicate(timeout=120)
    assert ends_in_time(pid)


def test_what_a_child_said_is_told_when_it_ends_too_early(tmp_path):
    with Children() as children:
        children.start(Child("the helper", [sys.executable, "-c", "print('no room')"], tmp_path / "log"))
        with pytest.raises(ChildError, match=r"the helper ended with code 0\n +no room"):
            children.wait_for(lambda: False, "never", timeout_s=120)


def test_waiting_is_bounded(tmp_path):
    with Children(grace_s=1.0) as children:
        children.start(Child("sleeper", SLEEP, tmp_path / "log"))
        with pytest.raises(ChildError, match="the moon: not within 1 s"):
            children.wait_for(lambda: False, "the moon", timeout_s=1)


def test_what_ends_again_and_again_is_given_up(tmp_path):
    child = Child("flapping", [sys.executable, "-c", "pass"], tmp_path / "log")
    for _ in range(MAX_RESTARTS):
        child.restart()
        child.process.wait(120)
    with pytest.raises(ChildError, match=f"flapping ended {MAX_RESTARTS + 1} times"):
        child.restart()


def test_only_a_process_that_ended_is_started_again_and_the_message_names_it(tmp_path, capsys):
    with Children(grace_s=1.0) as children:
        child = children.start(Child("sleeper", SLEEP, tmp_path / "log"))
        before = child.process.pid
        assert not child.restart_if_ended()
        child.process.kill()
        child.process.wait(120)
        assert child.restart_if_ended()
        assert child.process.pid != before
        assert child.exit_code is None
    assert capsys.readouterr().err == "sleeper ended with code -9; it is restarted\n"


def test_the_output_of_a_process_cannot_control_the_terminal(tmp_path):
    log = tmp_path / "log"
    log.write_text("first\n\x1b[2Jlast\r\x07\n")
    assert Child("x", ["true"], log).output_tail(1) == f"    [2Jlast\n  see       {log}"


def test_the_logs_of_a_process_have_a_bounded_size_and_keep_the_newest_lines(tmp_path):
    child = Child("a part", ["true"], tmp_path / "log")
    with child.log.open("ab", buffering=0) as output:  # as the process has it
        for number in range(2000):
            output.write(b"line %04d\n" % number)
            child.limit_log(max_bytes=2000)
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 2010
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    newest = (tmp_path / "log.1").read_text() + child.log.read_text()
    assert newest.splitlines() == [f"line {number:04d}" for number in range(2000)][-newest.count("\n") :]
    assert "line 1999" in child.output_tail()
