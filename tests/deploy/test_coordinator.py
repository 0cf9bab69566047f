from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from filelock import FileLock

from fedlearn.deploy import keys
from fedlearn.deploy.coordinator import main


@pytest.fixture
def keys_folder(tmp_path):
    keys.create(tmp_path / "keys", ["localhost"], ["a"])
    return tmp_path


def start(folder, *words):
    place = ["--keys", str(folder / "keys/coordinator"), "--state", str(folder / "s"), "--runs", str(folder / "r")]
    return main([*place, *words])


def test_a_port_that_is_taken_is_refused_by_name(keys_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert start(keys_folder, "--port", str(server.getsockname()[1])) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_an_expired_certificate_is_refused_before_anything_starts(keys_folder, monkeypatch, capsys):
    monkeypatch.setattr(keys, "CLOCK_SKEW", timedelta(days=3))
    certificate = keys_folder / "keys/coordinator/server.crt"
    monkeypatch.setattr("fedlearn.deploy.coordinator.time.time", lambda: keys.expiry(certificate).timestamp() + 1)
    assert start(keys_folder, "--port", "0") == 2
    told = capsys.readouterr().err
    assert "the server certificate expired on" in told
    assert "python -m fedlearn.deploy.keys renew" in told


def test_missing_keys_are_refused_by_name(tmp_path, capsys):
    assert start(tmp_path) == 2
    assert "keys/coordinator/server.crt cannot be read" in capsys.readouterr().err


def test_one_database_has_one_coordinator(keys_folder, capsys):
    (keys_folder / "s").mkdir()
    with FileLock(keys_folder / "s" / ".lock"):
        assert start(keys_folder, "--port", "0") == 2
    assert "is in use by another coordinator" in capsys.readouterr().err
