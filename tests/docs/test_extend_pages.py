"""The pages of docs/extend: every example runs as it stands, and every command composes.

A page is one module: its blocks of Python run in order in the module ``my_NAME``, where NAME is the file name of the
page, so that a setting such as ``privacy._target_=my_mechanism.laplace`` works. A block of YAML below a file name in
bold becomes that file, in the folder in which the blocks run.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedlearn import Schedule, federate, serial, start
from fedlearn.runner.compose import compose
from fedlearn.runner.plan import build_plan
from fedlearn.runner.start import parse_args
from strategies import ditto

PAGES = [p for p in sorted((Path(__file__).parents[2] / "docs/extend").glob("*.md")) if p.stem != "index"]
BLOCK = re.compile(r"^(?:\*\*(?P<file>\S+)\*\*\n+)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ["python", "-m", "simulations.run"]


def blocks(page: Path) -> list[re.Match]:
    return [*BLOCK.finditer(page.read_text(encoding="utf-8"))]


def run_page(page: Path, folder: Path) -> ModuleType:
    """Write the files of a page, run its Python and compose its commands; return the module of the page."""
    module = ModuleType(f"my_{page.stem}")
    sys.modules[module.__name__] = module
    for block in blocks(page):
        if block["language"] == "yaml" and block["file"]:
            path = folder / block["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"], encoding="utf-8")
        if block["language"] == "python":
            line = page.read_text(encoding="utf-8").count("\n", 0, block.start("text"))
            exec(compile("\n" * line + block["text"], str(page), "exec"), vars(module))
        if block["language"] == "bash":
            for words in map(shlex.split, block["text"].splitlines()):
                assert words[: len(RUN)] == RUN, f"a command of a page starts with {shlex.join(RUN)}"
                for job in compose(parse_args(words[len(RUN) :])):
                    build_plan(job.cfg)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, f"my_{page.stem}", raising=False)
    try:
        run_page(page, tmp_path)
    finally:
        sys.modules.pop(f"my_{page.stem}", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_an_example_and_calls_the_check_of_its_part(page):
    python = "".join(block["text"] for block in blocks(page) if block["language"] == "python")
    assert "assert " in python or re.search(r"^check_\w+\(", python, re.MULTILINE)


def test_a_block_that_fails_fails_the_page(tmp_path):
    page = tmp_path / "broken.md"
    page.write_text("# Broken\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError) as failed:
        run_page(page, tmp_path)
    assert failed.traceback[-1].lineno + 1 == 8, "the error has the line of the page"


def test_the_engine_of_the_page_evaluates_personal_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = run_page(next(page for page in PAGES if page.stem == "engine"), tmp_path)
    sys.modules.pop("my_engine", None)
    strategy, outputs = ditto(), []
    for builder in (page.Stopwatch, serial):
        engine = builder(page.data, page.trainer)
        state = start(strategy, page.trainer.init(1), engine, seed=1)
        *_, last = federate(strategy, engine, state, schedule=Schedule(rounds=2))
        results = engine.evaluate(last.state.params_D, engine.clients, strategy)
        outputs.append(np.concatenate([result.outputs for result in results]))
    assert np.array_equal(*outputs)
