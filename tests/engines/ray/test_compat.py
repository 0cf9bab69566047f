"""Undocumented names of Ray that fedlearn uses."""

from importlib.metadata import version

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")

from fedlearn.core import private_names
from fedlearn.engines.ray import compat
from fedlearn.errors import IncompatibleVersion


@pytest.mark.parametrize("feature", compat.RAY.names)
def test_the_installed_ray_has_every_name(feature):
    compat.RAY.verify(feature)


def test_the_installed_version_was_tried():
    assert version("ray") in compat.RAY.tried


def test_an_old_version_is_refused_with_one_command_to_try(monkeypatch):
    monkeypatch.setattr(private_names, "version", lambda library: "2.39.0")
    with pytest.raises(IncompatibleVersion) as refused:
        compat.verify_version()
    assert str(refused.value) == (
        "ray 2.39.0 does not work with this version of fedlearn\n"
        "  expected  ray>=2.40; tried with 2.55.1\n"
        '  try       pip install "ray==2.55.1"'
    )


def test_notices_are_off_only_inside():
    from ray._private import worker

    before = worker._worker_logs_enabled
    with compat.without_worker_notices():
        assert not worker._worker_logs_enabled
    assert worker._worker_logs_enabled == before


def test_a_ray_without_the_switch_still_runs_and_says_why_it_is_not_quiet(monkeypatch, caplog):
    from ray._private import worker

    monkeypatch.delattr(worker, "_worker_logs_enabled")
    with compat.without_worker_notices():
        pass
    assert "it has no ray._private.worker._worker_logs_enabled" in caplog.text
