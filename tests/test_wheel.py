"""The wheel has all files of an installation, and no file of the user's folder takes precedence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import fedlearn

ROOT = Path(fedlearn.__file__).parents[1]
PACKAGES = ("fedlearn", "strategies", "simulations")
SOURCES = (*PACKAGES, "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE")
DATA = ("README.md", "py.typed", "*.html", "*.service")
SCRIPT = "import sys; from simulations.cli import main; sys.exit(main())\n"  # as pip writes it
QUICK = ("scenario=diabetes", "rounds=1", "report=false", "hydra.run.dir=run")


def missing_tool():
    try:
        old = int(version("setuptools").split(".")[0]) < 77
    except PackageNotFoundError:
        return "setuptools is not installed"
    return "setuptools is older than 77" if old else ""


pytestmark = pytest.mark.skipif(bool(missing_tool()), reason=missing_tool() or "needs setuptools")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build a folder with the contents of the wheel, from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "-w", str(folder), str(source)], check=True, timeout=300, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"fedlearn-{fedlearn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def relative(folder, *patterns):
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern)}


def test_the_top_level_has_the_three_packages_only(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {*PACKAGES}
    (info,) = installed.glob("*.dist-info")
    assert {*(info / "top_level.txt").read_text().split()} == {*PACKAGES}
    assert "fedlearn = simulations.cli:main" in (info / "entry_points.txt").read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_each_module_and_data_file_is_inside_but_the_benchmarks(installed, package):
    expected = {name for name in relative(ROOT / package, "*.py", *DATA) if not name.startswith("benchmarks/")}
    assert relative(installed / package, "*.py", *DATA) == expected
    assert not (installed / package / "benchmarks").exists()


def test_all_settings_are_inside_unchanged(installed):
    assert relative(installed / "fedlearn/conf", "*") == relative(ROOT / "conf", "*")
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert (installed / "fedlearn/conf" / path.relative_to(ROOT / "conf")).read_bytes() == path.read_bytes()


def test_no_installed_module_imports_the_benchmarks(installed):
    for path in installed.rglob("*.py"):
        assert "simulations.benchmarks" not in path.read_text(encoding="utf-8"), path


@pytest.fixture
def start(installed, tmp_path):
    """Return a function that starts a program in ``work``.

    ``start("fedlearn", ...)`` runs the console command, and ``start("-m", module, ...)`` runs Python.
    """
    script = tmp_path / "bin" / "fedlearn"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (tmp_path / "work").mkdir()
    env = {**os.environ, "PYTHONPATH": str(installed), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words):
        command = [str(script), *words[1:]] if words[0] == "fedlearn" else words
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=180
        )

    run.folder = tmp_path / "work"
    return run


CLASHES = {  # a user's files with names of packages: all raise an error on import
    "packages of fedlearn": ("strategies/__init__.py", "simulations/__init__.py", "fedlearn/__init__.py"),
    "modules of fedlearn": ("strategies.py", "simulations.py", "fedlearn.py"),
    "a dependency": ("types.py", "torch.py", "random.py", "numpy/__init__.py", "rich.py", "hydra/__init__.py"),
    "settings": ("conf/config.yaml", "conf/strategy/fedprox.yaml"),
}


def write_clashes(folder, *kinds):
    for name in (name for kind in kinds for name in CLASHES[kind]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise RuntimeError('shadowed')\n")


def test_a_command_starts_from_an_empty_folder(start, installed):
    done = start("-m", "simulations.run", "--cfg", "job", "strategy=fedprox")
    assert (done.returncode, "strategies.fedprox" in done.stdout) == (0, True), done.stderr
    code = "from fedlearn.runner.compose import CONF_DIR; print(CONF_DIR)"
    assert start("-c", code).stdout.strip() == str(installed / "fedlearn/conf")


MINE = "import strategies\nhalfway = strategies.fedprox\n\ndef mine(*, mu=0.1):\n    return halfway(mu=mu)\n"


def test_the_console_command_works_whatever_the_users_files_are_called(start):
    pytest.importorskip("torch")
    write_clashes(start.folder, *(kind for kind in CLASHES if kind != "modules of fedlearn"))
    (start.folder / "my_code.py").write_text(MINE)
    (start.folder / "my_conf/strategy").mkdir(parents=True)
    (start.folder / "my_conf/strategy/mine.yaml").write_text("_target_: my_code.mine\nmu: 0.1\n")
    words = ("--config-dir", "my_conf", "strategy=mine", "allow_targets=[my_code]")
    done = start("fedlearn", "run", *QUICK, *words)
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout


def test_modules_of_the_user_with_the_names_of_our_packages_do_not_matter_either(start):
    write_clashes(start.folder, "modules of fedlearn")
    done = start("fedlearn", "run", "--cfg", "job", "strategy=fedprox")
    assert (done.returncode, "strategies.fedprox" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("form", ["strategies/__init__.py", "strategies.py"])
def test_python_m_refuses_a_users_package_that_shadows_ours_and_names_both(start, installed, form):
    (start.folder / form).parent.mkdir(exist_ok=True)
    (start.folder / form).write_text("raise RuntimeError('shadowed')\n")
    done = start("-m", "simulations.run", "strategy=fedprox", "scenario=diabetes")
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 3
    assert str(start.folder / "strategies") in lines[0]
    assert lines[1] == f"  expected  {installed / 'strategies'}"
    assert "the command fedlearn" in lines[2]


def test_python_m_does_not_mind_a_folder_without_init_or_the_users_settings(start):
    (start.folder / "strategies").mkdir()
    (start.folder / "strategies/mine.py").write_text("raise RuntimeError('shadowed')\n")
    write_clashes(start.folder, "settings")
    done = start("-m", "simulations.run", "--cfg", "job", "strategy=fedprox")
    assert (done.returncode, "strategies.fedprox" in done.stdout) == (0, True), done.stderr


def test_a_target_in_a_users_package_of_the_same_name_is_refused_with_both(start):
    write_clashes(start.folder, "packages of fedlearn")
    done = start("fedlearn", "run", "strategy._target_=strategies.mine.halfway", "scenario=diabetes")
    assert done.returncode == 2
    assert f"{start.folder / 'strategies'} is not searched" in done.stderr
    assert f"advice    rename {start.folder / 'strategies'}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [("run", "engine=ray"), ("deploy", "rehearse", "num_nodes=2")], ids=" ".join)
def test_processes_of_a_command_do_not_import_the_users_files_either(start, words):
    pytest.importorskip("torch")
    pytest.importorskip("flwr" if "deploy" in words else "ray")
    write_clashes(start.folder, "packages of fedlearn", "a dependency")
    (start.folder / "my_code.py").write_text(MINE)
    (start.folder / "my_conf/strategy").mkdir(parents=True)
    (start.folder / "my_conf/strategy/mine.yaml").write_text("_target_: my_code.mine\nmu: 0.1\n")
    mine = ("--config-dir", "my_conf", "strategy=mine", "allow_targets=[my_code]")
    done = start("fedlearn", *words, "scenario=diabetes", "rounds=1", "report=false", *mine)
    assert done.returncode == 0, done.stdout + done.stderr
