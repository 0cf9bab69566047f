"""A changed policy is in force at the next request; a broken file is never replaced by an earlier, wider policy."""

import logging
import os
import time

import pytest

from fedlearn.deploy.node_side import policy_file
from fedlearn.deploy.node_side.policy_file import UNREADABLE, PolicyFile
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.errors import FedlearnError

WIDE = "scenarios: {diabetes: {}}\nstrategies: {fedavg: {}, fedprox: {}}\nmax_rounds: 100\n"
NARROW = "scenarios: {diabetes: {}}\nstrategies: {fedavg: {}}\nmax_rounds: 5\n"


@pytest.fixture
def path(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(policy_file, "SETTLE_S", 0.05)
    write(tmp_path / "policy.yaml", WIDE)
    return tmp_path / "policy.yaml"


def write(path, text):
    path.write_text(text)


def test_a_narrowed_policy_is_in_force_at_the_next_request_and_the_log_has_its_time(path, caplog):
    file = PolicyFile(path)
    assert file.current().max_rounds == 100
    write(path, NARROW)
    assert file.current().max_rounds == 5
    assert file.current() is file.current()
    written = time.strftime("%H:%M", time.localtime(path.stat().st_mtime))
    assert [record.message for record in caplog.records] == [f"policy of {written} in force"] * 2


@pytest.mark.parametrize(
    "broken",
    ["", "scenarios: [", "[]", "scenarios: {diabetes: {}}", NARROW + "max_round: 3\n", NARROW + "reveal: 7\n", None],
    ids=["empty", "no YAML", "a list", "no strategies", "unknown key", "wrong type", "deleted"],
)
def test_a_broken_file_refuses_all_requests_until_it_is_corrected(path, broken, caplog):
    file = PolicyFile(path)
    path.unlink() if broken is None else write(path, broken)
    for _ in range(3):
        with pytest.raises(PolicyViolation) as refused:
            file.current()
        assert str(refused.value) == UNREADABLE  # without a path of the node
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "all requests are refused" in errors[0]
    write(path, NARROW)
    assert file.current().max_rounds == 5


def test_a_file_that_is_narrowed_while_the_node_starts_is_in_force(path, monkeypatch):
    read = policy_file.read_policy

    def read_and_narrow(path):
        policy = read(path)
        write(path, NARROW)
        return policy

    monkeypatch.setattr(policy_file, "read_policy", read_and_narrow)
    file = PolicyFile(path)
    monkeypatch.setattr(policy_file, "read_policy", read)
    assert file.current().max_rounds == 5


def test_a_file_that_is_being_written_is_not_read_in_parts(path, monkeypatch):
    monkeypatch.setattr(policy_file, "SETTLE_S", 1.0)
    file, parts = PolicyFile(path), [NARROW[:40], NARROW]
    write(path, parts.pop(0))

    def finish(seconds):
        if parts:
            write(path, parts.pop(0))
        else:
            os.utime(path, (time.time() - 5, time.time() - 5))

    monkeypatch.setattr(policy_file.time, "sleep", finish)
    assert file.current().max_rounds == 5
    assert not parts


def test_a_signal_reads_the_file_at_once(path, caplog):
    file = PolicyFile(path)
    write(path, NARROW)
    file.read_again()
    assert len([record for record in caplog.records if "in force" in record.message]) == 2
    file.read_again()  # a person asked for it, so the log has the answer
    assert len([record for record in caplog.records if "in force" in record.message]) == 3


def test_a_trainer_does_not_start_with_a_broken_policy(path):
    write(path, "nothing")
    with pytest.raises(FedlearnError):
        PolicyFile(path)
