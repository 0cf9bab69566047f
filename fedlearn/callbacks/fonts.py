"""Choose fonts of this machine that have the characters of a text, e.g. Chinese names of clients."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

BASE = "DejaVu Sans"  # part of matplotlib
# fonts with few differences between strokes and without serifs; "Last Resort" has boxes for all characters
PREFERRED = ("Noto Sans", "Source Han Sans", "WenQuanYi", "Microsoft YaHei", "PingFang", "Hiragino", "Arial Unicode")
ADVICE = "install a font with these characters, e.g. apt install fonts-noto-cjk, and write the report again"

log = logging.getLogger(__name__)


def choose_fonts(text: str) -> tuple[list[str], str]:
    """Return font families that together have the characters of a text, and the characters that no font has.

    The first family is the default font of matplotlib. The others are fonts of this machine, in the order in which they
    contribute; fonts without serifs come first.

    Args:
        text: all text of a figure.
    """
    families, missing = [BASE], _absent(set(text), _default_font())
    for family, path in _installed() if missing else ():
        absent = _absent(missing, path)
        if len(absent) < len(missing):
            families, missing = [*families, family], absent
        if not missing:
            break
    return families, "".join(sorted(missing))


def missing_glyphs_warning(characters: str) -> str:
    """Return a sentence on characters that no font of this machine has."""
    shown = characters[:10] + "..." * (len(characters) > 10)
    return f"no font of this machine has the characters {shown}, so the figures show boxes: {ADVICE}"


def _absent(characters: Iterable[str], path: str) -> set[str]:
    known = _characters(path)
    return {each for each in characters if ord(each) not in known and each.isprintable() and not each.isspace()}


@cache
def _characters(path: str) -> frozenset[int]:
    """Return the code points of a font file; empty for a file that matplotlib cannot draw."""
    from matplotlib.ft2font import FT2Font

    try:
        font: Any = FT2Font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (RuntimeError, OSError):
        return frozenset()


def _default_font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _installed() -> Iterator[tuple[str, str]]:
    """Yield family and file of the fonts that matplotlib knows, then of fonts that were installed later."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    yield from _regular(known)
    new = set(font_manager.findSystemFonts()) - known
    for path in new:
        try:
            font_manager.fontManager.addfont(path)
        except (RuntimeError, OSError, ValueError):
            log.info("the font %s cannot be read", path)
    yield from _regular(new)


def _regular(paths: Collection[str]) -> list[tuple[str, str]]:
    """Return family and file of the regular fonts among these files, fonts without serifs first."""
    from matplotlib import font_manager

    entries = {
        (entry.name, entry.fname)
        for entry in font_manager.fontManager.ttflist
        if entry.fname in paths
        and "LastResort" not in entry.name.replace(" ", "")
        and entry.style == "normal"
        and entry.weight in (400, "normal", "regular")
    }
    return sorted(entries, key=lambda entry: (_rank(entry[0]), entry))


def _rank(family: str) -> tuple[int, bool]:
    rank = next((number for number, name in enumerate(PREFERRED) if family.startswith(name)), len(PREFERRED))
    return rank, "Serif" in family or "Mono" in family
