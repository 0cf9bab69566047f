"""The Containerfile, the compose file and the page agree, and the images build and work."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/containers"
CONTAINERFILE = (FOLDER / "Containerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/how_to/containers.md").read_text(encoding="utf-8")
SERVICES = COMPOSE["services"]
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
BUILD_TIMEOUT_S = 1500


def filled(text):
    """Return a text of the compose file with the defaults of its variables."""
    return VARIABLE.sub(lambda found: found[2], text)


def mounts(service):
    """Return place in the container -> (source, mode)."""
    parts = [filled(volume).split(":") for volume in SERVICES[service]["volumes"]]
    return {place: (source, *mode) for source, place, *mode in parts}


@pytest.mark.parametrize("name", SERVICES)
def test_the_options_of_each_service_exist(name):
    command, *options = (filled(word) for word in SERVICES[name]["command"])
    import_module(f"fedlearn.deploy.{command}").build_parser().parse_args(options)


@pytest.mark.parametrize("name", SERVICES)
def test_each_path_of_a_command_is_a_mount(name):
    places = mounts(name)
    paths = re.findall(r"=(/[\w./]+)", " ".join(SERVICES[name]["command"]))
    assert paths
    for path in paths:
        assert any(path == place or path.startswith(f"{place}/") for place in places), path


@pytest.mark.parametrize("name", SERVICES)
def test_each_container_is_restricted(name):
    service = SERVICES[name]
    (user,) = re.findall(r"^USER (.*)$", CONTAINERFILE, re.MULTILINE)
    assert service["user"] == user == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    writable = {place for place, (source, *mode) in mounts(name).items() if mode != ["ro"]}
    assert all(mounts(name)[place][0] in COMPOSE["volumes"] for place in writable)
    (created,) = re.findall(r"install -d -o 10001 -g 10001 -m 0700 (.*)$", CONTAINERFILE, re.MULTILINE)
    assert writable <= set(created.split())


def test_the_container_with_data_has_no_network_and_the_other_no_data():
    assert SERVICES["trainer"]["network_mode"] == "none"
    assert "/data" not in mounts("node")
    assert "/client_states" not in mounts("node")
    assert "ports" not in SERVICES["node"]
    assert "ports" not in SERVICES["trainer"]


def test_the_ports_are_equal():
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", CONTAINERFILE, re.MULTILINE)
    (published,) = (filled(port) for port in SERVICES["coordinator"]["ports"])
    assert published == f"{exposed}:{exposed}"
    assert f"--port={exposed}" in SERVICES["coordinator"]["command"]


@pytest.mark.parametrize("name", SERVICES)
def test_the_health_checks_are_commands_that_exist(name):
    start, *words = SERVICES[name]["healthcheck"]["test"]
    entry = re.search(r"^ENTRYPOINT (.*)$", CONTAINERFILE, re.MULTILINE)[1]
    assert start == "CMD"
    assert words[:2] == yaml.safe_load(entry) == ["fedlearn", "deploy"]
    import_module(f"fedlearn.deploy.{words[2]}").build_parser().parse_args(words[3:])
    assert "HEALTHCHECK" not in CONTAINERFILE  # an OCI image drops it


def test_the_base_is_an_argument_and_no_file_names_a_registry():
    assert set(re.findall(r"^FROM (\S+)", CONTAINERFILE, re.MULTILINE)) == {"${BASE}"}
    for text in (CONTAINERFILE, (FOLDER / "compose.yaml").read_text(encoding="utf-8"), PAGE):
        assert not re.search(r"docker\.io|quay\.io|ghcr\.io|mcr\.|gcr\.io|pypi\.org", text)


def test_the_page_names_all_variables_arguments_and_images():
    named = set(re.findall(r"`([A-Z_]+)[=`]", PAGE))
    variables = {found[0] for found in VARIABLE.findall((FOLDER / "compose.yaml").read_text(encoding="utf-8"))}
    assert variables <= named
    for argument in re.findall(r"^ARG (\w+)", CONTAINERFILE, re.MULTILINE):
        assert f"--build-arg {argument}=" in PAGE
    for image in {filled(service["image"]) for service in SERVICES.values()}:
        assert f"-t {image} " in PAGE


def base_image():
    """Return the name of a base image with this Python; skip without a tool."""
    for tool in ("buildah", "mmdebstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the base image has Python 3.11, and the wheels are for this Python")
    return "localhost/fedlearn-test-base"


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout.strip()


@pytest.mark.endurance
@pytest.mark.slow
def test_the_image_of_a_coordinator_builds_and_its_commands_start(tmp_path):
    base, image = base_image(), "localhost/fedlearn-test-coordinator"
    source = tmp_path / "source"  # pip leaves files in the folder that it builds
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "docs", "*.egg-info"))
    (tmp_path / "dist").mkdir()
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "-w", str(tmp_path / "dist"), "-c", "constraints.txt")
    run(*pip, f"{source}[flower]", cwd=tmp_path)
    packages = "--include=python3,python3-venv"
    run("mmdebstrap", "--variant=minbase", packages, "bookworm", str(tmp_path / "base.tar"), cwd=tmp_path)
    container = run("buildah", "from", "scratch", cwd=tmp_path)
    try:
        run("buildah", "add", container, "base.tar", "/", cwd=tmp_path)
        run("buildah", "commit", "--rm", container, base, cwd=tmp_path)
        arguments = ("--build-arg", f"BASE={base}", "--build-arg", "EXTRAS=flower")
        file = str(FOLDER / "Containerfile")
        run("buildah", "build", "--isolation", "chroot", *arguments, "-f", file, "-t", image, ".", cwd=tmp_path)
        container = run("buildah", "from", image, cwd=tmp_path)
        inside = ("buildah", "run", "--isolation", "chroot", container, "--")
        assert run(*inside, "id", "-u", cwd=tmp_path) == "10001"
        for command in ("coordinator", "node", "trainer", "check"):
            assert "usage" in run(*inside, "fedlearn", "deploy", command, "--help", cwd=tmp_path)
    finally:
        subprocess.run(["buildah", "rm", container], capture_output=True)
        subprocess.run(["buildah", "rmi", image, base], capture_output=True)
