"""What the READMEs say works as they say it."""

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
from fedlearn.runner.config import build_plan
from fedlearn.runner.start import parse_args

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CATALOGUE = (ROOT / "strategies/README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUN = ["python", "-m", "simulations.run"]
OURS = "--config-dir"  # a command that needs the reader's own folder


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Each command of the shell blocks and of the code within sentences and tables, as words."""
    blocks = [line for block in fences(text, "bash") for line in block.splitlines()]
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in [*blocks, *re.findall(r"`(python -m [^`]+)`", without_blocks)]:
        for command in line.split("&&"):
            if words := shlex.split(command, comments=True):
                yield words


def files(text: str) -> dict[str, str]:
    """The files that the reader is told to write: a name in bold, then its contents."""
    return dict(re.findall(r"^\*\*(\S+)\*\*\n+```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


ALL = [*commands(README), *commands(CATALOGUE)]
RUNS = [words[len(RUN) :] for words in ALL if words[: len(RUN)] == RUN and OURS not in words]


def in_shell(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """A command as the reader types it, with this Python."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    argv = [sys.executable, *words[1:]]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
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


def test_your_own_data_are_read_as_written(tmp_path):
    pytest.importorskip("torch")
    section = README.partition("## Your own data")[2].partition("\n## ")[0]
    ((name, text),) = files(section).items()
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(text, encoding="utf-8")
    write, run, *_ = [words for words in commands(section) if words[0] == "python"]
    in_shell(write, tmp_path / "my_data")
    told = in_shell(run, tmp_path / "my_data").stdout
    assert "scaled by exact statistics of 3 clients" in told
    assert float(re.search(r"done .*accuracy ([\d.]+) %", told)[1]) > 90


def test_the_installation_commands_name_extras_that_there_are():
    installs = [words for words in ALL if words[:2] == ["pip", "install"]]
    assert [words[:4] for words in installs] == [["pip", "install", "-c", "constraints.txt"]] * 2
    named = {extra for extras in re.findall(r"'\.\[([\w,]+)\]'", README) for extra in extras.split(",")}
    assert {"all", "dev", "torch", "jax"} <= named <= set(PYPROJECT["project"]["optional-dependencies"])


def table(heading: str) -> list[list[str]]:
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_settings_table_names_real_settings_with_their_defaults():
    cfg, other = composed(), composed("strategy=fedprox", "model=linear", "early_stop.metric=loss")
    told = {name for row in table("Settings") for name in re.findall(r"`([\w.]+)`", row[0])}
    assert {"scenario", "strategy", "engine", "local.epochs", "max_failures"} <= told
    groups = {path.name for path in (ROOT / "conf").iterdir()}
    for name in told - {"hydra.run.dir"} - groups:
        assert OmegaConf.select(cfg, name, default=cfg) is not cfg, f"{name} is no setting"
    for name in re.findall(r"`((?:strategy|scenario|local|early_stop)\.\w+)`", README):
        assert any(OmegaConf.select(c, name, default=c) is not c for c in (cfg, other)), f"{name} is no setting"
    for row in table("Settings"):
        names, values = re.findall(r"`([\w.]+)`", row[0]), row[1].split(", ")
        for name, value in zip(names, values, strict=False):
            if re.fullmatch(r"[\d.]+|true", value):
                assert OmegaConf.select(cfg, name) == pytest.approx({"true": True}.get(value) or float(value)), name


def test_the_options_that_the_settings_table_lists_are_all_that_there_are():
    rows = {name: row[1] + row[2] for row in table("Settings") for name in re.findall(r"`([\w.]+)`", row[0])[:1]}
    for group in ("scenario", "model", "privacy", "poisoning", "compress"):  # of strategies there is a catalogue
        options = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert options == options & set(re.findall(r"`(\w+)`", rows[group])), group


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


@pytest.mark.parametrize("readme", ["README.md", "strategies/README.md"])
def test_links_and_images_lead_somewhere(readme):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / readme).read_text(encoding="utf-8"))
    for target in (target for target in targets if "://" not in target):
        assert (ROOT / readme).parent.joinpath(target).exists(), target


def test_the_readme_names_no_machine_and_is_not_too_wide():
    for line in (README + CATALOGUE).splitlines():
        assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users)/", line), line
        assert len(line) <= 130 or line.startswith("|"), line


def test_stopping_and_resuming_works_as_written(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    section = README.partition("## Stop and resume")[2].partition("\n## ")[0]
    for words in (words for words in commands(section) if words[0] == "python"):
        last = in_shell(words, tmp_path)
    assert (tmp_path / "my_run/report.html").exists()
    assert len((tmp_path / "my_run/metrics.jsonl").read_text().splitlines()) == 10
    assert last.stdout.strip() == "my_run/report.html"


def test_your_own_code_works_as_written(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    section = README.partition("## Your own code")[2].partition("\n## ")[0]
    written = files(section)
    assert len(written) == 6
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    first, sweep, tests = [words for words in commands(section) if words[0] == "python"]
    told = in_shell(first, tmp_path / "my_study").stdout
    assert "513 parameters" in told
    accuracy = float(re.search(r"done .*accuracy ([\d.]+) %", told)[1])
    assert accuracy > 85, "always the larger class is 63 %"
    assert in_shell(sweep, tmp_path / "my_study").stdout.count(" done ") == 4
    assert "2 passed" in in_shell(tests, tmp_path / "my_study").stdout
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
