from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from filelock import FileLock

from fedlearn.deploy import certificates, keys
from fedlearn.deploy.certificates import expiry
from fedlearn.deploy.coordinator import main
from fedlearn.errors import FedlearnError
from fedlearn.runner.registry import installed_registry, read_builders


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
    monkeypatch.setattr(certificates, "CLOCK_SKEW", timedelta(days=3))
    certificate = keys_folder / "keys/coordinator/server.crt"
    monkeypatch.setattr("fedlearn.deploy.coordinator.time.time", lambda: expiry(certificate).timestamp() + 1)
    assert start(keys_folder, "--port", "0") == 2
    shown = capsys.readouterr().err
    assert "the server certificate expired on" in shown
    assert "python -m fedlearn.deploy.keys renew" in shown


def test_missing_keys_are_refused_by_name(tmp_path, capsys):
    assert start(tmp_path) == 2
    assert "keys/coordinator/server.crt cannot be read" in capsys.readouterr().err


def test_one_database_has_one_coordinator(keys_folder, capsys):
    (keys_folder / "s").mkdir()
    with FileLock(keys_folder / "s" / ".lock"):
        assert start(keys_folder, "--port", "0") == 2
    assert "is in use by another coordinator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("strategy: [", "cannot be read"),
        ("[1]", "a mapping of groups"),
        ("strategies: {mine: my_code.mine}", "one of scenario"),
        ("strategy: {fedavg: my_code.mine}", "a name that no installed option has"),
    ],
)
def test_a_wrong_file_with_builders_is_refused(tmp_path, text, reason):
    (tmp_path / "builders.yaml").write_text(text)
    with pytest.raises(FedlearnError, match=reason):
        installed_registry().with_builders(read_builders(tmp_path / "builders.yaml"))


def test_a_file_with_builders_adds_options(tmp_path):
    (tmp_path / "builders.yaml").write_text("strategy: {mine: my_code.mine}\n")
    registry = installed_registry().with_builders(read_builders(tmp_path / "builders.yaml"))
    assert registry.builders["strategy"]["mine"] == "my_code.mine"
    assert registry.modules == ("my_code",)
