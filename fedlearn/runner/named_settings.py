"""Translate the settings of a run into names of options and values, and back.

A submission to a coordinator and an order to a node have this form. It has no dotted names, no interpolation and no
other key with a meaning in Hydra, so it cannot name code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedlearn.errors import SettingError
from fedlearn.runner.builders import SCENARIO_GROUPS, refuse_unknown_keys
from fedlearn.runner.conf_files import OPTION_GROUPS, installed_options, installed_settings
from fedlearn.runner.plain_values import refusal, require_plain, shortened
from fedlearn.runner.registry import NAME, NAMED_FILES, OPERATOR_SETTINGS, PARTS, Registry

CALLBACKS, METRICS = "callbacks", "metrics"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # reference of an installed callback to another setting
NOT_SENT = ("allow_targets",)  # consent of the person who starts a command; it does not apply elsewhere


def name_builder(registry: Registry, group: str, settings: Any, setting: str | None = None) -> Any:
    """Return the settings of a builder with the name of its option instead of its ``_target_``.

    Args:
        registry: known options.
        group: group of the option.
        settings: settings with ``_target_``, or the name of an option, or null.
        setting: name of the option in error texts; default: the group.

    Raises:
        SettingError: No option has this builder, or a value is not plain.
    """
    setting = setting or group
    if not isinstance(settings, Mapping):
        return settings
    values, target = dict(settings), settings.get("_target_")
    values.pop("_target_", None)
    name = registry.name_of(group, target)
    if name is None:
        expected = "an installed option: each operator registers other code under builders: in the node's policy"
        fix = f"an option file, {group}/NAME.yaml below --config-dir, and builders: {{{group}: {{NAME: {target}}}}}"
        raise SettingError(f"{setting}._target_", shortened(target), expected, fix)
    for key in OPERATOR_SETTINGS:
        if (group, key) in NAMED_FILES:
            continue
        value = values.pop(key, None)
        if value is not None and group != "scenario":
            raise refusal(f"{setting}.{key}", value, "null: the operator of a machine sets its files and servers")
    for key, value in values.items():
        if (group, key) in PARTS:
            part = PARTS[group, key]
            values[key] = name_builder(registry, part, value, key if part in SCENARIO_GROUPS else f"{setting}.{key}")
    require_plain(values, setting)
    return {NAME: name, **values}


def name_settings(registry: Registry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a run as names of options and plain values.

    Args:
        registry: known options.
        settings: all settings, with resolved references.

    Raises:
        SettingError: A builder has no name, or a value is not plain.
    """
    named = {name: value for name, value in settings.items() if name not in (*OPTION_GROUPS, *NOT_SENT)}
    for group in OPTION_GROUPS:
        if group == CALLBACKS:
            callbacks = settings.get(CALLBACKS) or {}
            named[CALLBACKS] = {key: _name_callback(registry, key, node) for key, node in callbacks.items()}
        elif group in settings:
            named[group] = name_builder(registry, group, settings[group])
    named[METRICS] = [registry.name_of("metric", path) or path for path in settings.get(METRICS) or ()]
    for path in named[METRICS]:
        registry.target("metric", path, METRICS)
    require_plain(named, "")
    return named


def resolve_settings(registry: Registry, named: Any) -> dict[str, Any]:
    """Return the settings of a run with a ``_target_`` in each group, from untrusted names and values.

    Nothing is built, and only modules of registered builders are imported.

    Raises:
        SettingError: A setting, an option or a value is unknown, or a value is not plain or of another type.
    """
    require_plain(named, "")
    if not isinstance(named, dict):
        raise refusal("settings", named, "a mapping of settings")
    known = installed_settings()
    refuse_unknown_keys({key: shortened(value) for key, value in named.items()}, [*known, *OPTION_GROUPS], "")
    settings = {name: value for name, value in named.items() if name not in (*OPTION_GROUPS, *NOT_SENT)}
    for name, value in settings.items():
        if isinstance(value, dict) != isinstance(known[name], dict):
            raise refusal(name, value, "a mapping" if isinstance(known[name], dict) else "a plain value")
    for group in OPTION_GROUPS:
        if group == CALLBACKS:
            settings[CALLBACKS] = _resolve_callbacks(registry, named.get(CALLBACKS))
        elif group in named:
            is_missing = named[group] is None and group in SCENARIO_GROUPS
            settings[group] = None if is_missing else registry.resolve(group, named[group])
    names = settings.get(METRICS) or []
    if not isinstance(names, list):
        raise refusal(METRICS, names, "a list of names")
    settings[METRICS] = [registry.target("metric", name, METRICS) for name in names]
    return {**settings, "allow_targets": []}


def _name_callback(registry: Registry, key: str, node: Any) -> Any:
    """Return the option of a callback, without the values for which the installed option refers to another setting."""
    named = name_builder(registry, CALLBACKS, node, f"{CALLBACKS}.{key}")
    references = _references(named[NAME]) if isinstance(named, dict) else {}
    return {name: value for name, value in named.items() if name not in references} if references else named


def _resolve_callbacks(registry: Registry, named: Any) -> dict[str, Any]:
    if named is None:
        named = {}
    if not isinstance(named, dict):
        raise refusal(CALLBACKS, named, "a mapping of callbacks")
    resolved: dict[str, Any] = {}
    for key, node in named.items():
        resolved[key] = None
        if node is not None:
            settings = registry.resolve(CALLBACKS, node, f"{CALLBACKS}.{key}")
            name = node if isinstance(node, str) else node[NAME]
            resolved[key] = {**settings, **_references(name)}
    return resolved


def _references(name: str) -> dict[str, str]:
    """Return key -> reference, for each value of an installed callback that refers to another setting."""
    node = installed_options()[CALLBACKS].get(name, {})
    return {key: value for key, value in node.items() if isinstance(value, str) and REFERENCE.fullmatch(value)}


def user_builders(registry: Registry, settings: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Any]:
    """Return the builders of the user's own option files, by the names of these files, for `Registry.with_builders`.

    Args:
        registry: known options.
        settings: all settings.
        choices: group -> name of the chosen option.
    """
    builders: dict[str, dict[str, str]] = {}
    for group in OPTION_GROUPS:
        nodes = settings.get(group) or {}
        named = nodes if group == CALLBACKS else {choices.get(group): nodes}
        for name, node in named.items():
            target = node.get("_target_") if isinstance(node, Mapping) else None
            is_new = (
                target and name and registry.name_of(group, target) is None and name not in registry.builders[group]
            )
            if is_new:
                builders.setdefault(group, {})[str(name)] = str(target)
    for path in settings.get(METRICS) or ():
        if isinstance(path, str) and "." in path:
            builders.setdefault("metric", {})[path.rpartition(".")[2]] = path
    return builders
