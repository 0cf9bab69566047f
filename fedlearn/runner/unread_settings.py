"""Refuse settings that nothing reads, and the removal of settings that each run has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlearn.advice import assignment, label
from fedlearn.core.command_line import UsageError
from fedlearn.errors import did_you_mean
from fedlearn.runner.conf_files import OPTION_GROUPS, installed_settings
from fedlearn.runner.renames import new_name

REFERENCE = re.compile(r"\$\{\s*\.*([A-Za-z_]\w*)")  # ``${name.part}``


def refuse_unread_settings(cfg: DictConfig, overrides: Sequence[str], explain: Callable[[str], str]) -> None:
    """Refuse a top-level setting that neither the library nor another setting reads.

    Hydra adds such a setting for ``+name=value``, or from a file of the user, and the run would ignore it.

    Args:
        cfg: composed settings, without the group ``hydra``.
        overrides: overrides as the user typed them.
        explain: function from the name of an unknown setting to the message.

    Raises:
        UsageError: nothing reads a setting, or an override removes a setting of each run.
    """
    for override in overrides:
        if override.startswith("~"):
            _refuse_removal(override)
    settings = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(settings, dict)
    referenced = {match for text in _texts(settings) for match in REFERENCE.findall(text)}
    for name in map(str, settings):
        if not (name in referenced or name in OPTION_GROUPS or name in installed_settings() or new_name(name)):
            keys = (re.split("[=@]", override.lstrip("+"))[0] for override in overrides)
            raise UsageError(explain(next((key for key in keys if key.startswith(f"{name}.")), name)))


def refuse_unknown_hydra_settings(node: DictConfig, path: str = "hydra") -> None:
    """Refuse a setting that ``+`` added to the settings of Hydra itself. Sweepers and launchers may have any.

    Raises:
        UsageError: Hydra has no such setting.
    """
    kind = OmegaConf.get_type(node)
    known = [*(field.name for field in fields(kind)), "env"] if is_dataclass(kind) else None  # a group without a field
    for key in map(str, node):
        if known is not None and key not in known:
            near = did_you_mean(key, known)
            hint = f"\n  did you mean {path}.{near}?" if near else ""
            raise UsageError(f"{path}.{key} is not a setting{hint}\n  expected  one of {', '.join(known)}")
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            child = node[key]
            if isinstance(child, DictConfig) and known is not None and key not in ("sweeper", "launcher"):
                refuse_unknown_hydra_settings(child, f"{path}.{key}")


def _refuse_removal(override: str) -> None:
    name = re.split("[=@]", override[1:])[0]
    if name in installed_settings() or name in OPTION_GROUPS:
        default = installed_settings().get(name)
        is_plain = name not in OPTION_GROUPS and not isinstance(default, Mapping)
        fix = assignment(name, default) if is_plain else f"leave {override} out"
        raise UsageError(f"{override} removes a setting of each run\n  expected  a value of {name}\n{label(fix)}")


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
