"""The settings and commands in the privacy README exist."""

import re
import shlex
from pathlib import Path

import pytest

import fedlearn.privacy
from fedlearn.privacy.calculator import EXAMPLES
from fedlearn.privacy.mechanisms import __all__ as mechanisms
from fedlearn.runner.compose import compose
from fedlearn.runner.plan import build_plan
from fedlearn.runner.start import parse_args

TEXT = (Path(fedlearn.privacy.__file__).parent / "README.md").read_text(encoding="utf-8")


def fences(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("line", [line for block in fences("bash") for line in block.splitlines()])
def test_every_command_is_one_that_runs(line):
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "simulations.run"]:
        (job,) = compose(parse_args(words[3:]))
        assert build_plan(job.cfg).privacy.kind in mechanisms
    else:
        assert words[:3] == ["python", "-m", "fedlearn.privacy.calculator"]
        assert {word.partition("=")[0] for word in words[3:]} <= set(EXAMPLES)


def test_the_code_does_what_it_says():
    pytest.importorskip("dp_accounting", reason="needs fedlearn[privacy]")
    names = {}
    (code,) = fences("python")
    exec(code, names)
    assert names["strategy"].privacy_guarantee.noise_multiplier == pytest.approx(2.6028, rel=1e-3)


def test_every_mechanism_is_described():
    assert all(f"`{name}`" in TEXT for name in mechanisms if name != "none")
