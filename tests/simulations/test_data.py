from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from fedlearn.data.download import DataSet, OfficialSource
from simulations import data as command
from simulations.datasets import registry, uci_heart

CONTENT = b"1,2\n"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Create one data set that is found in a folder."""
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "a.csv").write_bytes(CONTENT)
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    origin = OfficialSource(
        base_url=(tmp_path / "official").as_uri(), files={"a.csv": f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"}
    )
    built = DataSet(name="tiny", origins=(origin,), licence="CC0", clients="2 clinics", megabytes=0.001)
    monkeypatch.setattr(registry, "DATA_SETS", (built,))
    return built


def test_every_data_set_of_the_scenarios_is_found_and_says_under_which_licence():
    found = registry.data_sets()
    assert found["heart-disease-uci"] is uci_heart.HEART_DISEASE
    assert [name for name, data in found.items() if not (data.licence and data.about and data.citation)] == []


def test_listing_fetching_and_checking(tiny, tmp_path, capsys):
    assert command.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["tiny", "2", "clinics", "0.001", "MB", "CC0", "no"]
    assert command.main(["check", "tiny"]) == 3
    assert "try       python -m simulations.data fetch tiny" in capsys.readouterr().err
    assert command.main(["fetch", "tiny"]) == 0
    assert f"file      {tmp_path / 'cache' / 'tiny' / 'a.csv'} (4 bytes)" in capsys.readouterr().out
    assert command.main(["check", "tiny"]) == 0
    assert "here      cache of file:" in capsys.readouterr().out
    assert command.main(["check", "tiny", "--path", str(tmp_path / "official")]) == 0


def test_what_cannot_be_fetched_is_said_with_exit_code_3(tiny, tmp_path, capsys):
    (tmp_path / "official" / "a.csv").unlink()
    assert command.main(["fetch", "tiny"]) == 3
    assert "tiny cannot be found" in capsys.readouterr().err


def test_a_damaged_copy_is_told(tiny, tmp_path, capsys):
    assert command.main(["fetch", "tiny"]) == 0
    (tmp_path / "cache" / "tiny" / "a.csv").write_bytes(b"1,3\n")
    assert command.main(["check", "tiny"]) == 3


def test_an_unknown_name_is_guessed(tiny, capsys):
    assert command.main(["fetch", "tyny"]) == 2
    assert (
        capsys.readouterr().err
        == "NAME is tyny\n  expected  one of tiny\n  try       python -m simulations.data fetch tiny\n"
    )


@pytest.mark.process
def test_the_list_is_there_at_once_and_loads_no_framework(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path))
    code = (
        "import sys; from simulations import data; code = data.main(['list'])\n"
        "assert not {'torch', 'jax', 'sklearn', 'hydra', 'matplotlib'} & set(sys.modules), sys.modules.keys()\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "heart-disease-uci" in done.stdout
