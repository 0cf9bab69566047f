"""Detect the encoding of a text file from its bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SAMPLE_BYTES = 2**16
MIN_ZERO_SHARE = 0.3  # share of zero bytes in Western text in UTF-16
COMMON_LEAD_BYTES = range(0xB0, 0xD8)  # frequent Chinese characters in GB2312, which GB18030 contains
MIN_COMMON_SHARE = 0.8


def detect_encoding(chunks: Iterable[bytes]) -> tuple[str, bool]:
    """Return the encoding of a text, and whether it is a guess.

    A byte order mark and valid UTF-8 are certain. Other text is GB18030 if most of its characters are frequent Chinese
    characters, else Windows-1252.

    Args:
        chunks: the bytes of the whole file in parts. Only the start is read if it decides.

    >>> detect_encoding(["café".encode()]), detect_encoding(["café".encode("cp1252")])
    (('utf-8', False), ('cp1252', True))
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_first = True
    for chunk in chunks:
        marked = [encoding for mark, encoding in BYTE_ORDER_MARKS if chunk.startswith(mark)]
        if is_first and marked:
            return marked[0], False
        if is_first and (without_mark := _utf16_without_mark(chunk[:SAMPLE_BYTES])):
            return without_mark, True
        is_first = False
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return _guess(error.object[max(0, error.start - SAMPLE_BYTES) : error.start + SAMPLE_BYTES]), True
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return _guess(error.object), True
    return "utf-8", False


def _utf16_without_mark(sample: bytes) -> str | None:
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) < MIN_ZERO_SHARE * len(sample) or min(even, odd) > max(even, odd) / 4:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _guess(sample: bytes) -> str:
    """Return the probable encoding of text that is not UTF-8."""
    if _is_chinese(sample):
        return "gb18030"
    undefined = b"\x81\x8d\x8f\x90\x9d"  # bytes without a character in Windows-1252
    return "latin-1" if any(byte in undefined for byte in sample) else "cp1252"


def _is_chinese(sample: bytes) -> bool:
    leads, place = [], 0
    while place < len(sample) - 1:
        if sample[place] < 0x80:
            place += 1
        elif sample[place + 1] < 0x40:
            return False  # no GB18030 of two bytes
        else:
            leads.append(sample[place] in COMMON_LEAD_BYTES and sample[place + 1] >= 0xA1)
            place += 2
    return bool(leads) and sum(leads) >= MIN_COMMON_SHARE * len(leads)
