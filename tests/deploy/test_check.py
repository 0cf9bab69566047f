"""The health check tells a part that works from a part that does not."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest

from fedlearn.deploy import check
from fedlearn.deploy.coordinator_side.connections import CONNECTIONS_FILE
from fedlearn.deploy.coordinator_side.run_recovery import PROCESSES_FILE
from fedlearn.deploy.node_side.messenger_state import MessengerState


def test_it_reads_the_files_that_a_coordinator_writes():
    assert set(check.COORDINATOR_FILES.values()) == {CONNECTIONS_FILE, PROCESSES_FILE}


@pytest.mark.parametrize("part", check.COORDINATOR_FILES)
def test_a_coordinator_works_while_all_its_parts_do(tmp_path, capsys, part):
    for file in check.COORDINATOR_FILES.values():
        (tmp_path / file).write_text("{}")
    assert check.main([str(tmp_path)]) == 0
    old = time.time() - 2 * check.MAX_AGE_S
    os.utime(tmp_path / check.COORDINATOR_FILES[part], (old, old))
    assert check.main([str(tmp_path)]) == 3
    assert f"{part}   it has not worked for 60 s" in capsys.readouterr().out
    (tmp_path / check.COORDINATOR_FILES[part]).unlink()
    assert check.main([str(tmp_path)]) == 3


@pytest.mark.parametrize("part", ["coordinator", "trainer"])
def test_a_node_works_while_all_its_parts_do(tmp_path, capsys, part):
    state = MessengerState(tmp_path)
    state.report(coordinator="", trainer="")
    assert check.main([str(tmp_path)]) == 0
    state.report(**{part: "it does not answer"})
    assert check.main([str(tmp_path)]) == 3
    assert f"{part:<12}it does not answer" in capsys.readouterr().out


def test_a_messenger_that_hangs_is_a_problem(tmp_path):
    (tmp_path / "messenger.json").write_text(json.dumps({"time": time.time() - 60, "coordinator": "", "trainer": ""}))
    assert check.main([str(tmp_path)]) == 3


def test_a_socket_without_a_trainer_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 100 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
    assert check.main(["s"]) == 3


def test_another_path_is_refused(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 2
    assert "has no state" in capsys.readouterr().err
