"""Messages that are in memory, or in a file if they are large."""

from __future__ import annotations

import os

import pytest

from fedlearn.core import spool
from fedlearn.core.spool import Spool, TooLarge


def filled(folder, size, **settings):
    data, written = os.urandom(size), Spool(folder, **settings)
    for start in range(0, size, 7):
        written.write(data[start : start + 7])
    return data, written


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 5000])
def test_the_bytes_come_back(tmp_path, size):
    data, written = filled(tmp_path, size, max_memory_bytes=100)
    assert len(written) == size
    assert written.view() == data
    assert written.view(3, 9) == data[3:9]
    assert os.listdir(tmp_path) == []  # a file has no name, so a crash leaves nothing


def test_a_change_of_a_view_stays_in_this_view(tmp_path):
    data, written = filled(tmp_path, 5000, max_memory_bytes=100)
    view = written.view()
    view[0] = (data[0] + 1) % 256
    assert written.view() == data
    del written
    assert view[1:] == data[1:]


def test_a_message_above_its_limit_is_refused(tmp_path):
    with pytest.raises(TooLarge):
        filled(tmp_path, 101, max_bytes=100)


def test_a_message_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "MIN_FREE_BYTES", 2**60)
    monkeypatch.setattr(spool, "MIN_FREE_SHARE", 1.0)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path, 101, max_memory_bytes=100)
    assert os.listdir(tmp_path) == []
