"""Check that the commands of README, tutorials and guides work as written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from fedlearn.runner.compose import compose
from fedlearn.runner.plan import build_plan
from fedlearn.runner.start import parse_args

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CATALOGUE = (ROOT / "strategies/README.md").read_text(encoding="utf-8")
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
GUIDES = sorted((ROOT / "docs/how_to").glob("*.md"))
TEXTS = [README, CATALOGUE, *(page.read_text(encoding="utf-8") for page in [*TUTORIALS, *GUIDES])]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUN = ["python", "-m", "simulations.run"]
OURS = "--config-dir"  # a command that needs the reader's own folder


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Yield each command of the shell blocks and of the code within sentences and tables, as words."""
    blocks = [line for block in fences(text, "bash") for line in block.splitlines()]
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in [*blocks, *re.findall(r"`(python -m [^`]+)`", without_blocks)]:
        for command in line.split("&&"):
            if words := shlex.split(command, comments=True):
                yield words


def files(text: str) -> dict[str, str]:
    """Return the files that the reader writes: a name in bold, then its contents."""
    return dict(re.findall(r"^\*\*(\S+)\*\*\n+```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


ALL = [words for text in TEXTS for words in commands(text)]
IS_OTHERS = re.compile(r"clinics|my_tracker|FOLDER|FILE")  # commands on files of the reader
RUNS = [words[len(RUN) :] for words in ALL if words[: len(RUN)] == RUN and OURS not in words]
RUNS = [words for words in RUNS if not IS_OTHERS.search(" ".join(words))]


def in_shell(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a command in a shell as the reader types it, with this Python."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    redirected = words[-2:-1] == [">"]
    argv = [sys.executable, *(words[1:-2] if redirected else words[1:])]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    if redirected:
        (folder / words[-1]).write_text(done.stdout)
    return done


def composed(*words: str) -> DictConfig:
    return compose(parse_args(words))[0].cfg


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_every_run_in_the_readmes_composes_and_its_settings_are_in_range(words):
    for job in compose(parse_args(words)):
        build_plan(job.cfg)


def test_the_commands_of_the_readmes_were_found():
    assert len(RUNS) >= 15
    assert {"strategy=fedprox", "scenario=diabetes", "experiment=flamby_heart_fedadam"} <= {w for r in RUNS for w in r}


def follow(page: Path, folder: Path) -> str:
    """Write the files of a page, run its commands in order, and return their output."""
    text = page.read_text(encoding="utf-8")
    for name, content in files(text).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    blocks = "".join(f"```bash\n{block}```\n" for block in fences(text, "bash"))
    return "".join(in_shell(words, folder).stdout for words in commands(blocks))


@pytest.mark.slow
def test_the_tutorial_on_csv_files_works_as_written(tmp_path):
    pytest.importorskip("torch")
    output = follow(ROOT / "docs/tutorials/own_csv_files.md", tmp_path)
    assert "scaled by exact statistics of 3 clients" in output
    assert float(re.search(r"done .*accuracy ([\d.]+) %", output)[1]) > 90


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_federation", "privacy_from_zero", "real_nodes"])
def test_a_tutorial_works_as_written(name, tmp_path):
    pytest.importorskip("torch")
    follow(ROOT / f"docs/tutorials/{name}.md", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_commands_of_a_guide_work_as_written(page, tmp_path):
    pytest.importorskip("torch")
    if page.stem in ("own_study", "resume_and_predict", "operate"):
        pytest.skip("other tests cover this page")
    follow(page, tmp_path)


def test_the_installation_commands_name_extras_that_exist():
    installs = [words for words in ALL if words[:2] == ["pip", "install"]]
    assert {tuple(words[:4]) for words in installs} == {("pip", "install", "-c", "constraints.txt")}
    named = {extra for text in TEXTS for extras in re.findall(r"'\.\[([\w,]+)\]'", text) for extra in extras.split(",")}
    assert {"all", "dev", "docs", "torch", "jax"} <= named <= set(PYPROJECT["project"]["optional-dependencies"])


def test_the_readme_counts_strategies_and_scenarios_right():
    for group, pattern in (("strategy", r"\| strategies \| (\d+),"), ("scenario", r"\| scenarios \| (\d+) ")):
        assert int(re.search(pattern, README)[1]) == len(list((ROOT / "conf" / group).glob("*.yaml")))


def test_the_python_code_of_the_readme_is_the_first_example():
    (block,) = fences(README, "python")
    example = (ROOT / "examples/quickstart.py").read_text(encoding="utf-8")
    assert block == example.partition('"""\n\n')[2]


def test_the_catalogue_has_a_row_with_the_knobs_of_every_strategy():
    catalogue = CATALOGUE.partition("\n\n`delta` is")[0]
    rows = dict(re.findall(r"^\| `(\w+)` (.*)$", catalogue, re.MULTILINE))
    assert set(rows) == {path.stem for path in (ROOT / "conf/strategy").glob("*.yaml")}
    for name, row in rows.items():
        assert f"strategy={name}" in row
        cfg = composed(f"strategy={name}")
        for knob in ("learning_rate", "beta1", "beta2", "tau", "momentum", "mu"):
            default = OmegaConf.select(cfg, f"strategy.{knob}")
            if default is not None and "as `fedadam`" not in row:
                assert f"`{knob}` ({default})" in row, f"{name}: {knob}"


def test_the_readme_names_no_machine_and_is_not_too_wide():
    for line in (README + CATALOGUE).splitlines():
        assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users)/", line), line
        assert len(line) <= 130 or line.startswith("|"), line


def test_stopping_and_resuming_works_as_written(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    text = (ROOT / "docs/how_to/resume_and_predict.md").read_text(encoding="utf-8")
    for words in commands("```bash\n" + fences(text, "bash")[0] + "```\n"):
        last = in_shell(words, tmp_path)
    assert (tmp_path / "my_run/report.html").exists()
    assert len((tmp_path / "my_run/metrics.jsonl").read_text().splitlines()) == 10
    assert last.stdout.strip() == "my_run/report.html"


@pytest.mark.slow
def test_your_own_code_works_as_written(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    section = (ROOT / "docs/how_to/own_study.md").read_text(encoding="utf-8")
    written = files(section)
    assert len(written) == 6
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    first, sweep, tests = [words for words in commands(section) if words[0] == "python"]
    printed = in_shell(first, tmp_path / "my_study").stdout
    assert "513 parameters" in printed
    accuracy = float(re.search(r"done .*accuracy ([\d.]+) %", printed)[1])
    assert accuracy > 85, "predicting the larger class gives 63 %"
    lines = in_shell(sweep, tmp_path / "my_study").stdout.splitlines()
    assert sum(" accuracy " in line for line in lines if " done " in line or line.startswith("job ")) == 4
    assert "3 passed" in in_shell(tests, tmp_path / "my_study").stdout
    shown = in_shell(["python", "-m", "simulations.compare", "multirun"], tmp_path / "my_study")
    rows = json.loads(next((tmp_path / "my_study/multirun").glob("compare.json")).read_text())["rows"]
    settings = [row["setting"] for row in rows]
    assert [[word in setting for word in ("fedavg", "median", "torch", "jax")] for setting in settings] == [
        [True, False, True, False],
        [True, False, False, True],
        [False, True, True, False],
        [False, True, False, True],
    ], shown.stdout
    torch, jax = (float(row["final"].removesuffix(" %")) for row in rows[:2])
    assert torch == pytest.approx(jax, abs=2)
