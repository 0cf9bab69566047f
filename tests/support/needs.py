"""Skip test modules whose extra is not installed, without loading the extra."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(*modules: str, reason: str = "") -> None:
    """Skip the rest of a test module unless these top-level modules are installed."""
    for name in modules:
        if find_spec(name) is None:
            pytest.skip(reason or f"{name} is not installed", allow_module_level=True)
