"""Write the advice of flags as settings that the user can type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

PLAIN_TEXT = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)  # Hydra reads such text without quotes
RESERVED = frozenset({"true", "false", "null", "nan", "inf"})


def override(name: str, value: str | Sequence[str]) -> str:
    """Return ``name=value`` as a word for the command line.

    >>> print(override("scenario.ignore", ["patient id", "10"]))
    'scenario.ignore=["patient id","10"]'
    """
    text = _quoted(value) if isinstance(value, str) else f"[{','.join(map(_quoted, value))}]"
    return shlex.quote(f"{name}={text}")


def _quoted(text: str) -> str:
    if PLAIN_TEXT.fullmatch(text) and text.lower() not in RESERVED:
        return text
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), text) + '"'
