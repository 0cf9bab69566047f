"""Memory that returns to the operating system."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fedlearn.core.memory import release_pages

MIB = 2**20


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes pages back")
def test_released_pages_leave_the_memory_of_the_process_and_their_neighbors_stay():
    array = np.ones(64 * MIB, np.uint8)
    before = resident_bytes()
    release_pages(array[MIB + 3 : -MIB])
    assert before - resident_bytes() > 60 * MIB
    assert array[: MIB + 3].all()
    assert array[-MIB:].all()
    array[:] = 2
    assert (array == 2).all()


def test_an_array_of_less_than_a_page_keeps_its_values():
    array = np.ones(100, np.uint8)
    release_pages(array)
    assert array.all()
