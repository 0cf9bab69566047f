"""The benchmark of large sizes measures each of its rows, and ends its busy neighbor."""

import os
import subprocess

import pytest

pytest.importorskip("cryptography", reason="secure aggregation needs the extra privacy")
from simulations.benchmarks import scale

SIZES = {"updates": 12, "parameters": 500, "numbers": 5000, "clients": 5, "length": 10, "repeat": 1}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


def test_the_benchmark_measures_each_row(capsys, monkeypatch):
    started, before = [], dict(os.environ)

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    assert scale.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 + len(scale.RULES) + 2 + 1
    assert len(started) == 1
    assert started[0].poll() is not None, "the neighbor has ended"
    assert dict(os.environ) == before


def test_a_cohort_that_cannot_lose_two_clients_is_refused(capsys):
    assert scale.main([*SMALL, "--clients", "4"]) == 2
    assert "--clients is 4" in capsys.readouterr().err


def test_one_row_is_measured_alone(capsys):
    assert scale.main(["--rows", "eden", *SMALL]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
