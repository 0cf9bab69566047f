"""Find the option files in ``conf/``, and read the builder that each option names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

PACKAGED_CONF_DIR, CHECKOUT_CONF_DIR = Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf"
CONF_DIR = PACKAGED_CONF_DIR if PACKAGED_CONF_DIR.is_dir() else CHECKOUT_CONF_DIR
OPTION_GROUPS = (
    "scenario",
    "model",
    "partition",
    "strategy",
    "privacy",
    "compress",
    "poisoning",
    "system",
    "engine",
    "callbacks",
)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def installed_options() -> Mapping[str, Mapping[str, Any]]:
    """Return group -> name of the option -> its settings, as the option files have them.

    In the group ``callbacks``, the name of an option is the name of the callback. A model of the library is a name
    without a builder, so its settings are this name.
    """
    return {group: _options_of(group) for group in OPTION_GROUPS}


@cache
def installed_settings() -> Mapping[str, Any]:
    """Return the top-level settings in ``conf/config.yaml``, without the lists of Hydra."""
    content = _read(CONF_DIR / "config.yaml")
    return {key: value for key, value in content.items() if key not in ("defaults", "hydra")}


def _options_of(group: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for path in sorted((CONF_DIR / group).glob("*.yaml")):
        content = _read(path)
        if group == "callbacks":
            options |= content
        else:
            options[path.stem] = content.get(group, content)  # a scenario also has settings of other groups
    return {name: node for name, node in options.items() if not isinstance(node, dict) or node.get("_target_")}


def _read(path: Path) -> dict[str, Any]:
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)  # a safe loader
    return content if isinstance(content, dict) else {}
