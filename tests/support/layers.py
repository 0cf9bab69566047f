"""Which layer a test belongs to, by what it starts; every test has exactly one.

The most exact row wins; a mark on the test itself wins over the table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

NAMES = ("unit", "framework", "process", "cli", "docs")
OWN = ("fedlearn", "simulations", "strategies")  # whose docstrings are tested

TABLE = {
    **dict.fromkeys(OWN, "unit"),
}


def pytest_configure(config):
    config.pluginmanager.register(Layers(config.rootpath), "layers of the tests")


class Layers:
    """Marks tests, and reads no file that holds none of those that were asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def layer_of(self, path: Path) -> str | None:
        """What the table says about a file; None if nothing."""
        if not path.is_relative_to(self.root):
            return None
        words = path.relative_to(self.root).with_suffix("").parts
        rows = ("/".join(words[:length]) for length in range(len(words), 0, -1))
        return next((TABLE[row] for row in rows if row in TABLE), None)

    def pytest_ignore_collect(self, collection_path, config):
        if collection_path.suffix != ".py" or not collection_path.is_relative_to(self.root):
            return None
        text = collection_path.read_text(encoding="utf-8")
        if collection_path.relative_to(self.root).parts[0] in OWN and ">>>" not in text:
            return True
        wanted = config.option.markexpr
        others = wanted in NAMES and self.layer_of(collection_path) not in (wanted, None)
        return True if others and f"mark.{wanted}" not in text else None

    def pytest_itemcollected(self, item):
        layer = self.layer_of(item.path)
        if layer and not any(item.iter_markers(name) for name in NAMES if item.get_closest_marker(name)):
            item.add_marker(layer)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        wrong = [item.nodeid for item in items if len({m.name for m in item.iter_markers() if m.name in NAMES}) != 1]
        if wrong:
            raise pytest.UsageError("not in exactly one layer (tests/support/layers.py):\n  " + "\n  ".join(wrong))
        # long ones first, so that no process of pytest-xdist is left with them in the end
        items.sort(key=lambda item: next(NAMES[::-1].index(name) for name in NAMES if item.get_closest_marker(name)))
