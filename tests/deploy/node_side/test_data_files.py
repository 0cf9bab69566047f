"""Data that an operator deletes, changes or adds are noticed at the next hello."""

import os
import subprocess
import sys

import pytest

from fedlearn.deploy.node_side.data_files import DataFiles


def rewrite(path):
    path.write_text("other")


def same_size_and_time(path):
    status = path.stat()
    path.write_text(path.read_text()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (status.st_mtime_ns, status.st_size)


def restored(path):
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


def same_size(path):
    path.write_text(path.read_text()[::-1])
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda folder: None, []),
        (lambda folder: (folder / "north.csv").unlink(), ["north.csv"]),
        (lambda folder: rewrite(folder / "north.csv"), ["north.csv"]),
        (lambda folder: same_size(folder / "north.csv"), ["north.csv"]),
        (lambda folder: same_size_and_time(folder / "north.csv"), ["north.csv"]),
        (lambda folder: restored(folder / "north.csv"), []),
        (lambda folder: os.link(folder / "north.csv", folder.parent / "backup"), []),
        (lambda folder: (folder / "north.csv").chmod(0o600), []),
        (lambda folder: (folder / "deep" / "new.csv").write_text("1"), ["new.csv"]),
        (lambda folder: (folder / "deep" / "south.csv").rename(folder / "south.csv"), ["south.csv", "south.csv"]),
    ],
    ids=[
        *("nothing", "deleted", "rewritten", "same size", "same size and time"),
        *("restored", "backed up", "other rights", "added", "moved"),
    ],
)
def test_each_change_in_the_folder_is_noticed(tmp_path, change, names):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "north.csv").write_text("12345")
    (folder / "deep" / "south.csv").write_text("12345")
    files = DataFiles(folder)
    assert files.changes() == []  # no data are in memory
    files.remember(files.versions(), {})
    digest = files.digest()
    change(folder)
    assert files.changes() == files.changes() == names
    files.forget()
    assert files.changes() == []
    files.remember(files.versions(), {})
    assert (files.digest() == digest) == (len(names) != 1)  # a digest has names without folders


@pytest.mark.parametrize("max_bytes", [0, 2**30])
def test_an_edit_while_the_data_are_read_is_noticed(tmp_path, max_bytes):
    path = tmp_path / "north.csv"
    path.write_text("12345")
    files = DataFiles(tmp_path, max_bytes)
    before = files.versions()
    same_size_and_time(path)  # after the builder has read it
    files.remember(before, {})
    assert files.changes() == ["north.csv"]
    files.remember(files.versions(), {})  # another scenario reads the new contents, the first has the old ones
    assert files.changes() == ["north.csv"]


def test_large_data_are_known_by_their_versions(tmp_path):
    (tmp_path / "north.csv").write_text("12345")
    digests = {}
    for max_bytes in (4, 5):
        files = DataFiles(tmp_path, max_bytes)
        files.remember(files.versions(), {})
        kind, _, digests[max_bytes] = files.digest().partition(":")
        assert kind == ("contents" if max_bytes == 5 else "versions")
        same_size_and_time(tmp_path / "north.csv")
        assert files.changes() == ["north.csv"]
    assert len(set(digests.values())) == 2


def test_equal_contents_have_equal_digests_in_each_folder_and_at_each_time(tmp_path):
    digests = set()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "north.csv").write_text("12345")
        os.utime(folder / "north.csv", ns=(number, number))
        files = DataFiles(folder)
        files.remember(files.versions(), {})
        digests.add(files.digest())
    assert len(digests) == 1


def test_no_file_in_the_folder_blocks_the_node(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "lost").symlink_to("nowhere")
    files = DataFiles(tmp_path)
    files.remember(files.versions(), {})
    assert files.digest().startswith("versions:")
    assert files.changes() == []


def test_files_that_a_builder_opens_elsewhere_are_watched_too(tmp_path):
    """Use a separate process, because an audit hook cannot be removed."""
    (tmp_path / "far.csv").write_text("a,b\n1,2\n")
    code = f"""
import csv, json, os
from pathlib import Path
from fedlearn.deploy.node_side.data_files import DataFiles, record_opened_files, recorded
record_opened_files()
files, path = DataFiles(None), Path({str(tmp_path / "far.csv")!r})
path.read_text()
with recorded() as opened:
    with path.open() as file:
        rows = list(csv.reader(file))
    import wave  # modules are no data
    Path({str(tmp_path / "written.txt")!r}).write_text("a result is no data")
path.with_name("later.csv").write_text("1")
files.remember({{}}, opened)
before = files.changes()
path.unlink()
print([before, files.changes()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[], ['far.csv']]"


def test_the_digest_of_the_data_changes_with_each_change_and_names_no_folder(tmp_path):
    (tmp_path / "north.csv").write_text("a,b\n1,2\n")
    files, digests = DataFiles(tmp_path), set()
    assert files.digest() == ""
    for change in (lambda path: None, lambda path: path.write_text("a,b\n1,3,4\n"), lambda path: path.unlink()):
        change(tmp_path / "north.csv")
        files.forget()
        files.remember(files.versions(), {})
        digests.add(files.digest())
    assert len(digests) == 3
    assert "" in digests
