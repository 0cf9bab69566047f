"""Data that an operator deletes, changes or adds are noticed at the next hello."""

import os
import subprocess
import sys

import pytest

from fedlearn.deploy.node_side.data_files import DataFiles


def rewrite(path):
    path.write_text("other")


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
        (lambda folder: (folder / "deep" / "new.csv").write_text("1"), ["new.csv"]),
        (lambda folder: (folder / "deep" / "south.csv").rename(folder / "south.csv"), ["south.csv", "south.csv"]),
    ],
    ids=["nothing", "deleted", "rewritten", "same size", "added", "moved"],
)
def test_each_change_in_the_folder_is_noticed(tmp_path, change, names):
    (tmp_path / "deep").mkdir()
    (tmp_path / "north.csv").write_text("12345")
    (tmp_path / "deep" / "south.csv").write_text("12345")
    files = DataFiles(tmp_path)
    assert files.changes() == []  # no data are in memory
    files.remember(set())
    change(tmp_path)
    assert files.changes() == names
    files.forget()
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
files.remember(opened)
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
        files.remember(set())
        digests.add(files.digest())
    assert len(digests) == 3
    assert "" in digests
