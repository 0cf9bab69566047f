"""Undocumented names of Hydra that fedlearn uses."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from fedlearn.core import private_names
from fedlearn.errors import IncompatibleVersion
from fedlearn.runner import compat


@pytest.mark.parametrize("feature", compat.HYDRA.names)
def test_the_installed_hydra_has_every_name(feature):
    compat.HYDRA.verify(feature)


def test_the_installed_version_was_tried():
    assert version("hydra-core") in compat.HYDRA.tried


@pytest.mark.parametrize("installed", ["1.3.1", "1.4.0"])
def test_another_version_is_refused_with_one_command_to_try(monkeypatch, installed):
    monkeypatch.setattr(private_names, "version", lambda library: installed)
    with pytest.raises(IncompatibleVersion) as refused:
        compat.command_line_parser()
    assert str(refused.value) == (
        f"hydra-core {installed} does not work with this version of fedlearn\n"
        "  expected  hydra-core>=1.3.2,<1.4; tried with 1.3.8\n"
        '  try       pip install "hydra-core==1.3.8"'
    )


def test_a_missing_name_is_told(monkeypatch):
    from hydra._internal import utils

    monkeypatch.delattr(utils, "get_args_parser")
    with pytest.raises(IncompatibleVersion, match=r"has no hydra\._internal\.utils\.get_args_parser"):
        compat.command_line_parser()


@pytest.mark.process
def test_importing_the_module_does_not_import_hydra():
    code = "import sys, fedlearn.runner.compat; assert not {'hydra', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_overrides_are_parsed_with_their_values():
    (single,) = compat.parse_override("strategy.mu=0.5")
    assert (single.text, single.setting, single.value) == ("strategy.mu=0.5", "strategy.mu", 0.5)
    (sweep,) = compat.parse_override("seed=1,2")
    assert sweep.is_discrete_sweep
    assert list(sweep.choices()) == ["seed=1", "seed=2"]
    (interval,) = compat.parse_override("seed=interval(0,1)")
    assert interval.is_interval
